"""The keys of a DeepSpeed 0.19.8 JSON and their kinds, so that a mistake is found without importing DeepSpeed.

DeepSpeed ignores unknown keys at the top level in silence, and refuses those inside blocks only once the model is
loaded. A test compares this page with the installed DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from dsdpo.config.load import did_you_mean

Config = dict[str, Any]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# DeepSpeed takes 5e8, a float in JSON, as a whole number.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "count": ("a whole number", lambda value: _number(value) and value >= 0 and float(value).is_integer()),
    "number": ("a number", _number),
    "text": ("text", lambda value: isinstance(value, str)),
    "block": ("a block in { }", lambda value: isinstance(value, dict)),
    "any": ("anything", lambda value: True),
}


def _block(**kinds: str) -> dict[str, str]:
    return {key: kind for kind, keys in kinds.items() for key in keys.split()}


BLOCKS: dict[str, dict[str, str]] = {
    "": _block(
        flag="disable_allgather disable_python_gc dump_state dataloader_drop_last managed_gradient_accumulation "
        "memory_breakdown prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        count="gradient_accumulation_steps sequence_parallel_size steps_per_print train_batch_size "
        "train_micro_batch_size_per_gpu vocabulary_size",
        number="gradient_clipping gradient_predivide_factor",
        text="communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type",
        block="activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger compile csv_monitor "
        "data_efficiency data_types datastates_ckpt expert_parallel flops_profiler fp16 hybrid_engine optimizer "
        "pipeline scheduler tensor_parallel tensorboard timers torch_autocast wandb weight_quantization "
        "zero_optimization",
    ),
    "zero_optimization": _block(
        flag="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
        "compute_grad_norm load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters legacy_stage1 "
        "round_robin_gradients parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights "
        "zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
        "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
        count="stage reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size",
        block="offload_param offload_optimizer zenflow leaf_module",
    ),
    "zero_optimization.offload_param": _block(
        flag="pin_memory", count="buffer_count buffer_size max_in_cpu", text="device nvme_path"
    ),
    "zero_optimization.offload_optimizer": _block(
        flag="pin_memory pipeline_read pipeline_write fast_init super_offload",
        count="buffer_count",
        number="ratio cpuadam_cores_perc",
        text="device nvme_path",
    ),
    "zero_optimization.leaf_module": _block(any="classes names name_suffixes"),
    "bf16": _block(
        flag="enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "fp16": _block(
        flag="enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
        count="initial_scale_power loss_scale_window hysteresis min_loss_scale",
        number="loss_scale",
    ),
    "aio": _block(flag="single_submit overlap_events use_gds", count="block_size queue_depth intra_op_parallelism"),
    "data_types": _block(text="grad_accum_dtype param_dtype buffer_dtype", any="keep_in_fp32_modules"),
    "torch_autocast": _block(flag="enabled", text="dtype", any="lower_precision_safe_modules"),
    "optimizer": _block(text="type", block="params", flag="legacy_fusion"),
    "scheduler": _block(text="type", block="params"),
    "checkpoint": _block(
        text="tag_validation", flag="load_universal use_node_local_storage", any="checkpoint_serialization writer",
        block="parallel_write",
    ),
    "activation_checkpointing": _block(
        flag="contiguous_memory_optimization cpu_checkpointing partition_activations profile "
        "synchronize_checkpoint_boundary",
        any="number_checkpoints",
    ),
}  # fmt: skip

CHOICES: dict[str, tuple[Any, ...]] = {
    "zero_optimization.stage": (0, 1, 2, 3),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "data_types.grad_accum_dtype": ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32"),
    "communication_data_type": ("bf16", "fp16", "fp32"),
}

REMOVED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
    "zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
)  # fmt: skip

# Names DeepSpeed still takes. One name for one thing here, since much is decided from these values.
RENAMED: dict[str, str] = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory inside offload_param and offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
} | {
    f"zero_optimization.{key.removeprefix('stage3_')}": key
    for key in BLOCKS["zero_optimization"]
    if key.startswith("stage3_")
}

# Dotted key -> the one value that dsdpo can run with, and why.
REQUIRED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (False, "dsdpo itself decides which micro-batches make a step"),
    "sequence_parallel_size": (1, "dsdpo has no sequence parallelism"),
    "gradient_allreduce_op": ("mean", "a sum would multiply the gradient by the number of ranks"),
    "optimizer.params.max_grad_norm": (None, "DeepSpeed refuses it; use gradient_clipping"),
    "compile.deepcompile": (False, "DeepSpeed refuses it with gradient accumulation owned by the caller"),
    "zero_optimization.compute_grad_norm": (True, "dsdpo logs the gradient norm, and takes no step where it is NaN"),
    "bf16.check_grad_overflow": (True, "a NaN gradient would go into the weights"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.offload_optimizer.super_offload": (False, "dsdpo has not been shown to work with it"),
    "wandb.enabled": (False, "each engine would start its own run; use tracking.wandb of the run"),
}  # fmt: skip
UNSUPPORTED = (
    "autotuning", "data_efficiency", "datastates_ckpt", "expert_parallel", "hybrid_engine", "pipeline",
    "tensor_parallel", "weight_quantization", "zero_optimization.zenflow",
)  # fmt: skip


# DeepSpeed's own types; it looks for any other in torch.optim and torch.optim.lr_scheduler.
OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "muon", "musgd")  # in any case
SCHEDULES = ("LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR")


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
    if not fits(value):
        quoted = " without quotes" if isinstance(value, str) and kind in ("flag", "count", "number") else ""
        yield f"{name} is {shown}, but it takes {allowed}{quoted}"
    elif name in CHOICES and value not in CHOICES[name]:
        yield f"{name} is {shown}; allowed: {', '.join(map(json.dumps, CHOICES[name]))}"
    elif name in REQUIRED and value != REQUIRED[name][0]:
        required, reason = REQUIRED[name]
        yield f"{name} is {shown}, but must be {'left out' if required is None else json.dumps(required)}: {reason}"
    elif name in UNSUPPORTED and value.get("enabled") is not False:
        yield f"{name} is not supported by dsdpo: delete it"
    elif name in BLOCKS:
        yield from find_mistakes(value, name)
    elif kind == "block":
        for key, inner in value.items():
            if f"{name}.{key}" in REQUIRED:
                yield from _value_mistakes(f"{name}.{key}", inner, "any")
