"""What DeepSpeed 0.19.8 would ignore, or refuse only once the model is loaded, in a config filled from the run.

Each function yields one message per problem; `zero_config` puts the file's name before it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsdpo.config.load import did_you_mean
from dsdpo.config.run import RunConfig
from dsdpo.console import counted
from dsdpo.engine.deepspeed_keys import OPTIMIZERS, SCHEDULES, Config, lookup
from dsdpo.engine.optimizer_limits import needs_whole_gradients, optimizer_kind

MONITORS = {"tensorboard": "tensorboard", "comet": "comet_ml"}  # block -> the package it takes
# What an engine computes with, beside its dtype: policy and reference must have the same.
NUMERIC_KEYS = (
    "torch_autocast.enabled", "torch_autocast.dtype", "torch_autocast.lower_precision_safe_modules",
    "data_types.param_dtype", "data_types.buffer_dtype", "data_types.keep_in_fp32_modules",
    "zero_optimization.zero_quantized_weights",
)  # fmt: skip
# "auto" that is a value of DeepSpeed's own.
KEPT_AUTO = ("data_types.keep_in_fp32_modules",)


def left_auto(block: Any, path: str = "") -> Iterator[str]:
    """Every "auto" that nothing has filled: DeepSpeed would drop it and take its default."""
    if block == "auto" and path not in KEPT_AUTO:
        yield f'{path} is "auto", but nothing in the run decides it: write a value or delete it'
    for key, value in block.items() if isinstance(block, dict) else ():
        yield from left_auto(value, f"{path}.{key}".removeprefix("."))


def batch_problems(config: Config, run: RunConfig, run_source: str | Path) -> Iterator[str]:
    """A batch triple that says something else than the run, which alone makes steps and micro-batches."""
    if config.get("managed_gradient_accumulation") is False:
        return  # a resolved config given back to us: the triple is our own bookkeeping
    total = config.get("train_batch_size", "auto")
    micro = config.get("train_micro_batch_size_per_gpu", "auto")
    pairs, fixed = run.batch.pairs_per_step, run.batch.pairs_per_micro_batch
    if total not in ("auto", pairs):
        yield (
            f"train_batch_size is {total}, but {run_source} has batch.pairs_per_step {pairs}: "
            'make them agree, or write "auto" in the JSON'
        )
    if micro not in ("auto", fixed):
        ours = f"batch.pairs_per_micro_batch {fixed}" if fixed else "a token budget, batch.tokens_per_micro_batch"
        yield (
            f"train_micro_batch_size_per_gpu is {micro}, but {run_source} has {ours}: "
            f'set batch.pairs_per_micro_batch to {micro}, or write "auto" in the JSON'
        )
    if config.get("gradient_accumulation_steps", "auto") not in ("auto", 1):
        yield (
            f"gradient_accumulation_steps is {config['gradient_accumulation_steps']}, but dsdpo makes as many "
            f'micro-batches as batch.pairs_per_step of {run_source} takes: write "auto" in the JSON'
        )


def type_problems(config: Config) -> Iterator[str]:
    """An optimizer or scheduler block that names nothing DeepSpeed or torch has."""
    for block, known in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULES)):
        if block not in config:
            continue
        name = config[block].get("type")
        if name is None:
            yield f"{block}.type is missing: name it, or delete the block and dsdpo makes its own from the run"
            continue
        wanted = name.lower() if block == "optimizer" else name
        if wanted not in known and not _torch_has(block, name):
            guess = did_you_mean(wanted, known) or f": name another, or delete {block} and it follows from the run"
            yield f"{block}.type {name} is neither DeepSpeed's nor torch's{guess}"


def _torch_has(block: str, name: str) -> bool:
    import torch  # about a second, and only for a name that is not DeepSpeed's

    return hasattr(torch.optim if block == "optimizer" else torch.optim.lr_scheduler, name)


def training_problems(config: Config, run: RunConfig) -> Iterator[str]:
    """What DeepSpeed does otherwise than it should.

    At stage 0 in 16 bits Adam has already counted a step when training starts, which makes the first update a quarter
    too small, and in fp32 there is no gradient norm to report (measured; stages 1 to 3 agree with plain torch). With
    round_robin_gradients, stages 1 and 2 give other parameters' float32 values than those asked for (measured).
    """
    if not lookup(config, "zero_optimization.stage"):
        yield (
            "zero_optimization.stage is 0 (DeepSpeed's default), at which DeepSpeed starts Adam one step late: "
            "use stage 1, which also takes less memory"
        )
    if lookup(config, "zero_optimization.round_robin_gradients") and run.reference.sync_ref_model:
        yield (
            "zero_optimization.round_robin_gradients is true, with which DeepSpeed mixes up the float32 weights that "
            "reference.sync_ref_model moves towards: delete it"
        )
    if (ratio := lookup(config, "zero_optimization.offload_optimizer.ratio")) is not None and ratio < 1:
        yield (
            f"zero_optimization.offload_optimizer.ratio is {ratio}, with which DeepSpeed leaves a part of Adam's state "
            "out of its checkpoints: delete it"
        )


def reduction_problems(config: Config) -> Iterator[str]:
    """What DeepSpeed refuses beside `reduce_scatter`, which is its default."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) < 2 or zero.get("reduce_scatter") is False:
        return
    if config.get("prescale_gradients"):
        yield f"prescale_gradients is true, which stage {zero['stage']} refuses with reduce_scatter: delete it"
    if (factor := config.get("gradient_predivide_factor", 1)) != 1:
        yield (
            f"gradient_predivide_factor is {factor}, which stage {zero['stage']} refuses with reduce_scatter: delete it"
        )
    if optimizer_kind(config) != "muon" or not needs_whole_gradients(config):
        return
    if zero["stage"] == 3:
        yield (
            "optimizer.type Muon takes whole gradients, which stage 3 has without zero_optimization.reduce_scatter "
            'only: write "reduce_scatter": false, or use stage 1 or 2'
        )
    elif lookup(config, "bf16.enabled") or lookup(config, "fp16.enabled"):
        yield (
            "optimizer.type Muon at stage 2 with data_types.grad_accum_dtype fp32 loses gradients under "
            'zero_optimization.reduce_scatter (DeepSpeed 0.19.8): write "reduce_scatter": false'
        )


def package_problems(config: Config) -> Iterator[str]:
    """Monitors and optimizers whose package is not installed."""
    kind = str(lookup(config, "optimizer.type")).lower()
    if kind in ("muadam", "muadamw", "musgd") and importlib.util.find_spec("mup") is None:
        yield f"optimizer.type {config['optimizer']['type']} needs the package mup, which is not installed: install it"
    for block, package in MONITORS.items():
        if lookup(config, f"{block}.enabled") and importlib.util.find_spec(package) is None:
            yield f"{block}.enabled is true, but the package {package} is not installed: install it or delete {block}"


def stage_problems(config: Config, world_size: int) -> Iterator[str]:
    """Blocks that do not go with the ZeRO stage."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    yield from reduction_problems(config)
    yield from _offload_problems(zero, stage)
    if zero.get("overlap_comm") and stage < 2:
        yield (
            f"zero_optimization.overlap_comm is true at stage {stage}: where the caller owns gradient accumulation, "
            "as dsdpo does, DeepSpeed can overlap at stages 2 and 3 only; delete it"
        )
    group = zero.get("zero_hpz_partition_size", 1)
    if group > 1 and (stage != 3 or world_size % group):
        ranks = counted(world_size, "rank")
        yield (
            f"zero_optimization.zero_hpz_partition_size {group} needs stage 3 and must divide the {ranks}: give a "
            "divisor, or delete it"
        )


def _offload_problems(zero: Config, stage: int) -> Iterator[str]:
    for what, lowest in (("param", 3), ("optimizer", 1)):
        block = zero.get(f"offload_{what}", {})
        device = block.get("device", "none")
        key = f"zero_optimization.offload_{what}"
        if device != "none" and stage < lowest:
            yield f"{key} needs stage {lowest} or more and is ignored at stage {stage}: delete it or raise the stage"
        elif device == "nvme" and stage != 3:
            yield f"{key}.device nvme needs stage 3, not {stage}: use cpu or raise the stage"
        elif block.get("ratio", 1) < 1 and stage != 3:
            yield f"{key}.ratio {block['ratio']} needs stage 3, not {stage}: delete it or raise the stage"
        if device == "nvme" and "nvme_path" not in block:
            yield f"{key}.nvme_path is missing: name a folder on the NVMe disk"


def inference_problems(config: Config) -> Iterator[str]:
    """What an engine without an optimizer cannot have."""
    for key in ("optimizer", "scheduler", "zero_optimization.offload_optimizer"):
        if lookup(config, key) is not None:
            yield f"{key} has no place in a reference, which is never trained: delete it"
    stage = lookup(config, "zero_optimization.stage")
    if stage in (1, 2):
        yield f"zero_optimization.stage {stage} needs an optimizer, which a reference has not: use 0 or 3"
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.get(key, "auto") not in ("auto", 1):
            yield (
                f"{key} is {json.dumps(config[key])}, but a reference scores reference.score_tokens tokens at a "
                "time: delete it"
            )


def sharing_problems(config: Config, policy: Config) -> Iterator[str]:
    """What a reference and a policy in one process cannot both have, and what decides numbers, which both must have."""
    for key in NUMERIC_KEYS:
        mine, given = lookup(config, key), lookup(policy, key)
        if mine != given:
            yield (
                f"{key} is {json.dumps(mine)}, but the policy's DeepSpeed JSON has {json.dumps(given)}: the two would "
                "differ before any training; make them agree"
            )
    yield from swap_problems(config, policy)
    group = "zero_optimization.zero_hpz_partition_size"
    if (lookup(config, group) or 1) > 1 and (lookup(policy, group) or 1) > 1:
        yield f"{group} is set for the policy too, and DeepSpeed can make that group only once: delete it here"


def swap_problems(config: Config, policy: Config) -> Iterator[str]:
    """A folder for swapped parameters of the reference that is the policy's too."""
    path = "zero_optimization.offload_param.nvme_path"
    theirs = [lookup(policy, path), lookup(policy, "zero_optimization.offload_optimizer.nvme_path")]
    ours = lookup(config, path)
    if ours and os.path.abspath(ours) in [os.path.abspath(folder) for folder in theirs if folder]:
        yield f"{path} {ours} is the policy's too, and each engine deletes the other's swap files: use another folder"
