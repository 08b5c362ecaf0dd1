"""What dsdpo makes of the keys of a DeepSpeed JSON, so that a mistake is found without importing DeepSpeed.

DeepSpeed ignores unknown keys at the top level in silence, and refuses those inside blocks only once the model is
loaded. Its keys and their kinds stand in `deepspeed_schema.json`, which `dsdpo.engine.quirks.make_schema` writes from
DeepSpeed itself; here are the rules of our own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsdpo.config.load import did_you_mean
from dsdpo.config.shipped import page

Config = dict[str, Any]
SCHEMA_FILE = Path(__file__).with_name("deepspeed_schema.json")
_SCHEMA: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) if SCHEMA_FILE.exists() else {}
TESTED_VERSION: str = _SCHEMA.get("deepspeed", "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 2**63 and float(value).is_integer()


# DeepSpeed takes 5e8, a float in JSON, as a whole number.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "count": ("a whole number", _is_count),
    "number": ("a number", _is_number),
    "text": ("text", lambda value: isinstance(value, str)),
    "list": ("a list, or one text", lambda value: isinstance(value, list | str)),
    "block": ("a block in { }", lambda value: isinstance(value, dict)),
    "any": ("anything", lambda value: True),
}
# Kinds that DeepSpeed's code does not tell, and keys that it reads only once the ranks are connected.
BESIDE: dict[str, dict[str, str]] = {
    "": {
        "communication_data_type": "text", "gradient_accumulation_steps": "count", "log_level": "text",
        "sequence_parallel_size": "count", "steps_per_print": "count", "train_batch_size": "count",
        "train_micro_batch_size_per_gpu": "count", "vocabulary_size": "count",
    } | dict.fromkeys(
        ("autotuning", "data_efficiency", "datastates_ckpt", "expert_parallel", "hybrid_engine", "pipeline",
         "tensor_parallel", "weight_quantization"), "block",
    ),
    "data_types": {"grad_accum_dtype": "text", "param_dtype": "text", "buffer_dtype": "text",
                   "keep_in_fp32_modules": "any"},
    "torch_autocast": {"dtype": "text"},
    "optimizer": {"type": "text", "params": "block", "legacy_fusion": "flag"},
    "scheduler": {"type": "text", "params": "block"},
    "checkpoint": {"checkpoint_serialization": "any"},
    "wandb": {"enabled": "flag"},
}  # fmt: skip
REMOVED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
    "zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param", "compile.disable", "compile.enabled", "compile.backend", "compile.kwargs",
)  # fmt: skip
# Names DeepSpeed still takes. One name for one thing here, since much is decided from these values.
_OLD = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory inside offload_param and offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
RENAMED: dict[str, str] = _OLD | {
    name: f"stage3_{name.rsplit('.', 1)[1]}" for name in _SCHEMA.get("old_names", ()) if name not in _OLD
}
BLOCKS: dict[str, dict[str, str]] = {
    path: {
        key: kind
        for key, kind in {**kinds, **BESIDE.get(path, {})}.items()
        if f"{path}.{key}".removeprefix(".") not in (*REMOVED, *RENAMED)
    }
    for path, kinds in _SCHEMA.get("blocks", {}).items()
}

CHOICES: dict[str, tuple[Any, ...]] = {
    **{name: tuple(values) for name, values in _SCHEMA.get("choices", {}).items()},
    "data_types.grad_accum_dtype": ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32"),
    "communication_data_type": ("bf16", "fp16", "fp32"),
    "checkpoint.tag_validation": ("Ignore", "Warn", "Fail"),
    "torch_autocast.dtype": ("bfloat16", "float16"),
}
AT_LEAST: dict[str, float] = {
    "zero_optimization.reduce_bucket_size": 1,
    "zero_optimization.allgather_bucket_size": 1,
    "zero_optimization.offload_param.buffer_count": 1,
    "zero_optimization.offload_param.buffer_size": 1,
    "zero_optimization.offload_optimizer.buffer_count": 1,
    "zero_optimization.zero_hpz_partition_size": 1,
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 1,
    "aio.block_size": 1,
    "aio.queue_depth": 1,
    "aio.intra_op_parallelism": 1,
}


# Dotted key -> the one value that dsdpo can run with, and why.
REQUIRED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (False, "dsdpo itself decides which micro-batches make a step"),
    "sequence_parallel_size": (1, "dsdpo splits rows itself; use distributed.sequence_parallel of the run"),
    "gradient_allreduce_op": ("mean", "a sum would multiply the gradient by the number of ranks"),
    "optimizer.params.max_grad_norm": (None, "DeepSpeed refuses it; use gradient_clipping"),
    "compile.deepcompile": (False, "DeepSpeed refuses it with gradient accumulation owned by the caller"),
    "zero_optimization.compute_grad_norm": (True, "dsdpo logs the gradient norm, and takes no step where it is NaN"),
    "bf16.check_grad_overflow": (True, "a NaN gradient would go into the weights"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.offload_optimizer.super_offload": (False, "dsdpo has not been shown to work with it"),
    "checkpoint.writer": (
        None, "the run would not end, and no checkpoint it writes can be resumed; checkpoint of the run saves"
    ),
    "checkpoint.checkpoint_serialization": (None, "dsdpo reads the files that DeepSpeed writes by default"),
    "checkpoint.load_universal": (False, "dsdpo's own loading does what it is for: other ranks, stages and offload"),
    "wandb.enabled": (False, "each engine would start its own run; use tracking.wandb of the run"),
}  # fmt: skip
UNSUPPORTED = (
    "autotuning", "data_efficiency", "datastates_ckpt", "expert_parallel", "hybrid_engine", "pipeline",
    "tensor_parallel", "weight_quantization", "zero_optimization.zenflow",
)  # fmt: skip


# DeepSpeed's own types; it looks for any other in torch.optim and torch.optim.lr_scheduler.
OPTIMIZERS: tuple[str, ...] = tuple(_SCHEMA.get("optimizers", ()))  # in any case
SCHEDULES: tuple[str, ...] = tuple(_SCHEMA.get("schedulers", ()))


def untested_deepspeed() -> str | None:
    """A line for the start of a run under a DeepSpeed that dsdpo was never tested with, None under the tested one."""
    installed = version("deepspeed").split("+")[0]
    if installed == TESTED_VERSION:
        return None
    return (
        f"DeepSpeed {installed} is installed, but dsdpo was tested with {TESTED_VERSION} only, and relies on some of "
        f"its private behaviour ({page('deepspeed-quirks.md')})"
    )


def lookup(config: Config, dotted: str) -> Any:
    """The value at a dotted key, or None."""
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def find_mistakes(config: Config, path: str = "") -> Iterator[str]:
    """One message for each key that DeepSpeed would ignore, refuse or misread, block by block."""
    known = BLOCKS[path]
    for key, value in config.items():
        name = f"{path}.{key}".removeprefix(".")
        if name in REMOVED:
            yield f"{name} was removed from DeepSpeed: delete it"
        elif name in RENAMED:
            yield f"{name} is an old name: write {RENAMED[name]}"
        elif "." in key:
            yield f'"{key}" is a dotted key, which DeepSpeed ignores: write one block inside another'
        elif key not in known:
            yield f"{name} is not a DeepSpeed key{did_you_mean(key, known)}"
        elif value != "auto" or known[key] == "block":
            yield from _value_mistakes(name, value, known[key])


def _value_mistakes(name: str, value: Any, kind: str) -> Iterator[str]:
    allowed, fits = KINDS[kind]
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    if not fits(value):
        quoted = " without quotes" if isinstance(value, str) and kind in ("flag", "count", "number") else ""
        yield f"{name} is {shown}, but it takes {allowed}{quoted}"
    elif name in CHOICES and value not in CHOICES[name]:
        yield f"{name} is {shown}; allowed: {', '.join(map(json.dumps, CHOICES[name]))}"
    elif name in AT_LEAST and value < AT_LEAST[name]:
        yield f"{name} is {shown}, but must be {AT_LEAST[name]:g} or more"
    elif name in REQUIRED and value != REQUIRED[name][0]:
        required, reason = REQUIRED[name]
        yield f"{name} is {shown}, but must be {'left out' if required is None else json.dumps(required)}: {reason}"
    elif name in UNSUPPORTED and value.get("enabled") is not False:
        yield f"{name} is not supported in dsdpo, delete it"
    elif name in BLOCKS:
        yield from find_mistakes(value, name)
    elif kind == "block":
        for key, inner in value.items():
            if f"{name}.{key}" in REQUIRED:
                yield from _value_mistakes(f"{name}.{key}", inner, "any")
