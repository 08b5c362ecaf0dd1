"""Bytes that an engine takes on one rank under its DeepSpeed config: what it holds, and what comes and goes.

Source: DeepSpeed 0.19.8's `stage3.py`, `stage_1_and_2.py` and `bf16_optimizer.py`; `benchmarks/estimate_error.py` holds
it against tensors counted in real runs. N parameters, of which T train; b bytes an element; W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsdpo.engine.deepspeed_keys import lookup
from dsdpo.engine.optimizer_limits import optimizer_kind, sums_in_float32
from dsdpo.engine.zero_config import offload_device, stage
from dsdpo.estimate.gathers import Gathers, gathers_of
from dsdpo.estimate.weights import Weights

Place = str  # "device", "host" or "nvme"
Amounts = Mapping[tuple[str, Place], float]
"""Bytes by what they are for and where they are."""

WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE = "weights", "gradients", "optimizer", "moving average"
GATHERED, BUFFERS, ACTIVATIONS, HEAD = "gathered layers", "buffers", "activations", "head chunk"
ALLOWANCE = "allowance"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, ACTIVATIONS, HEAD, GATHERED, BUFFERS, ALLOWANCE)

FLOAT32 = 4
BLOCK = 256  # elements that share two scales in float32 under 8-bit AdamW
# float32 numbers that an optimizer keeps for each element beside the master weight; Adam's two where it is not named.
STATES = {"lion": 1, "adagrad": 1, "sgd": 1, "adamw_8bit": 2 / FLOAT32 + 2 / BLOCK}
ADAM_STATES = 2
# What a step that is not fused makes for each element, where that is not as many as it keeps (measured on a CPU).
TEMPORARIES = {"lion": 3, "sgd": 2, "adamw_8bit": 5.25}
SUB_GROUP = 1_000_000_000  # elements, DeepSpeed's default
REDUCE_BUCKET, GATHER_BUCKET = 500_000_000, 500_000_000


@dataclass(frozen=True)
class EngineMemory:
    """What one engine takes on one rank."""

    held: Amounts  # all the time
    training: Amounts  # besides, in forward and backward passes: beside activations
    scoring: Amounts  # besides, in passes without gradient
    update: Amounts  # besides, while the optimizer steps
    gathers: Gathers | None  # of a training pass under stage 3, or of a scoring pass where the engine never trains
    scoring_gathers: Gathers | None


def policy_memory(
    config: dict[str, Any], weights: Weights, *, ranks: int, checkpointing: bool, fused: bool = True
) -> EngineMemory:
    """Of the engine that trains. `fused`: the optimizer steps without temporaries, as torch's AdamW does on CUDA."""
    if stage(config) == 3:
        return _stage3(config, weights, ranks=ranks, checkpointing=checkpointing, fused=fused)
    return _stage12(config, weights, ranks=ranks, fused=fused)


def reference_memory(config: dict[str, Any], weights: Weights, *, ranks: int) -> EngineMemory:
    """Of an engine that only answers: weights, and under stage 3 what it gathers."""
    if stage(config) == 3:
        held = {**_shards(config, weights, ranks), **_parameter_buffers(config, weights)}
        gathers = _gathers(config, weights, ranks, backward=False)
        held = _plus(held, {(GATHERED, "device"): weights.itemsize * gathers.persistent})
        scoring = _gathered(gathers, weights)
        return EngineMemory(held, {}, scoring, {}, gathers, gathers)
    held = {(WEIGHTS, "device"): float(weights.itemsize * weights.total() + weights.scales)}
    return EngineMemory(held, {}, {}, {}, None, None)


def average_memory(weights: Weights, config: dict[str, Any], *, ranks: int, trained_only: bool) -> Amounts:
    """Of TR-DPO's float32 average beside 16-bit weights: where this rank's shard of the reference is."""
    if weights.itemsize == FLOAT32:
        return {}
    which = True if trained_only else None
    elements = weights.sharded(ranks, trained=which) if stage(config) == 3 else weights.total(trained=which)
    place: Place = "host" if offload_device(config, "param") != "none" else "device"
    return {(AVERAGE, place): float(FLOAT32 * elements)}


def optimizer_states(config: dict[str, Any], weights: Weights | None = None) -> float:
    """float32 numbers for each trained element beside its master weight; of Muon at most, without the `weights`.

    Muon keeps one for each element of the layers and Adam's two for the rest. At stages 1 and 2 on the device it is two
    in the weights' dtype, of which a step works on one.
    """
    kind, on_host = optimizer_kind(config), offload_device(config, "optimizer") != "none"
    if kind == "muon" and weights is not None:
        layers = sum(sum(size for size, trains in zip(part.sizes, part.trained, strict=True) if trains)
                     for part in weights.parts if part.block is not None)  # fmt: skip
        share = layers / max(1, weights.total(trained=True))
        staged = not on_host and stage(config) < 3 and not _is_bf16_optimizer(config, weights.itemsize)
        return share * (2 * weights.itemsize / FLOAT32 if staged else 1) + (1 - share) * ADAM_STATES
    if kind == "lion" and on_host:
        return 2  # DeepSpeed's keeps one that it has no use for
    if kind == "sgd" and not lookup(config, "optimizer.params.momentum"):
        return 0
    return STATES.get(kind, ADAM_STATES)


def sums_bytes(config: dict[str, Any], itemsize: int) -> int:
    """Bytes of an element of the sums of gradients over micro-batches."""
    return FLOAT32 if sums_in_float32(config) else itemsize


def _is_bf16_optimizer(config: dict[str, Any], itemsize: int) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, whose sums of gradients are whole and in float32."""
    return bool(
        stage(config) == 1 and sums_bytes(config, itemsize) == FLOAT32 > itemsize and lookup(config, "bf16.enabled")
    )


def _stage12(config: dict[str, Any], weights: Weights, *, ranks: int, fused: bool) -> EngineMemory:
    zero, b, level = config["zero_optimization"], weights.itemsize, stage(config)
    trained = weights.total(trained=True)
    share = -(-trained // ranks)
    sums, states = sums_bytes(config, b), optimizer_states(config, weights)
    on_host = offload_device(config, "optimizer") != "none"
    place: Place = "host" if on_host else "device"
    held = {
        (WEIGHTS, "device"): float(b * weights.total() + weights.scales),
        (OPTIMIZER, place): float((1 + states) * FLOAT32 * share),
    }
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * b * (2 if zero.get("overlap_comm") else 1)
    largest = max(weights.sizes(trained=True), default=0)
    training = {(BUFFERS, "device"): float(min(bucket, 2 * b * trained))}
    if on_host:  # gradients in float32 on the host, and a 16-bit copy of the share for the way back
        held[GRADIENTS, "host"] = float(FLOAT32 * share)
        held[BUFFERS, "host"] = float(b * share + b * largest)
        held[BUFFERS, "device"] = float(b * largest)
        training[GRADIENTS, "host"] = float(b * share)
        if sums == FLOAT32 > b:  # DeepSpeed keeps these sums on the device all the same
            training[GRADIENTS, "device"] = float(FLOAT32 * share)
        return EngineMemory(held, training, {}, {}, None, None)
    step = _step_temporaries(share, TEMPORARIES.get(optimizer_kind(config), states), fused=fused)
    if _is_bf16_optimizer(config, b):
        held[GRADIENTS, "device"] = float(FLOAT32 * trained)
        whole = float(b * trained)  # each micro-batch's, before it is added
        training[GRADIENTS, "device"] = whole
        return EngineMemory(held, training, {}, {(GRADIENTS, "device"): whole, (BUFFERS, "device"): step}, None, None)
    kept = sums * trained if level == 1 else sums * share
    training[GRADIENTS, "device"] = float(kept)
    flat = float(FLOAT32 * share)  # which replaces them
    update = {(GRADIENTS, "device"): flat, (BUFFERS, "device"): max(step, kept - flat)}
    return EngineMemory(held, training, {}, update, None, None)


def _stage3(config: dict[str, Any], weights: Weights, *, ranks: int, checkpointing: bool, fused: bool) -> EngineMemory:
    zero, b = config["zero_optimization"], weights.itemsize
    share = weights.sharded(ranks, trained=True)
    sums, states = sums_bytes(config, b), optimizer_states(config, weights)
    device = offload_device(config, "optimizer")
    held: dict[tuple[str, Place], float] = {**_shards(config, weights, ranks), **_parameter_buffers(config, weights)}
    group = min(share, int(zero.get("sub_group_size", SUB_GROUP)))
    optimizer = float((states + 1) * FLOAT32 * share)  # masters are a copy in float32 too
    update: dict[tuple[str, Place], float] = {}
    if device == "none":
        held[OPTIMIZER, "device"] = optimizer
        held[GRADIENTS, "device"] = float(sums * share)
        flat = FLOAT32 * group
        made = TEMPORARIES.get(optimizer_kind(config), states)
        update[BUFFERS, "device"] = flat + _step_temporaries(group, made, fused=fused)
    elif device == "cpu":
        held[OPTIMIZER, "host"] = optimizer
        held[GRADIENTS, "host"] = float((sums + FLOAT32) * share)
    else:
        held[OPTIMIZER, "nvme"] = optimizer + FLOAT32 * share
        held[GRADIENTS, "host"] = float(sums * share)
        count = int(zero["offload_optimizer"].get("buffer_count", 4))
        held[BUFFERS, "host"] = held.get((BUFFERS, "host"), 0.0) + float(count * FLOAT32 * group)
    bucket = float(int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * b)
    held = _plus(held, {(BUFFERS, "device"): bucket})
    gathers = _gathers(config, weights, ranks, backward=True, checkpointing=checkpointing)
    scoring = _gathers(config, weights, ranks, backward=False)
    held = _plus(held, {(GATHERED, "device"): b * gathers.persistent})
    return EngineMemory(held, _gathered(gathers, weights), _gathered(scoring, weights), update, gathers, scoring)


def _shards(config: dict[str, Any], weights: Weights, ranks: int) -> dict[tuple[str, Place], float]:
    """This rank's part of the weights, and with hpZ its node's copy of them."""
    shard = float(weights.itemsize * weights.sharded(ranks))
    device = offload_device(config, "param")
    place = {"none": "device", "cpu": "host", "nvme": "nvme"}[device]
    held: dict[tuple[str, Place], float] = {(WEIGHTS, place): shard}
    if weights.scales:
        held = _plus(held, {(WEIGHTS, "device"): float(weights.scales)})
    group = int(lookup(config, "zero_optimization.zero_hpz_partition_size") or 1)
    if group > 1:
        held = _plus(held, {(WEIGHTS, "device"): float(weights.itemsize * weights.sharded(group))})
    return held


def _parameter_buffers(config: dict[str, Any], weights: Weights) -> dict[tuple[str, Place], float]:
    """Host memory through which parameters on NVMe go."""
    if offload_device(config, "param") != "nvme":
        return {}
    block = config["zero_optimization"]["offload_param"]
    elements = int(block.get("buffer_count", 5)) * int(block.get("buffer_size", 100_000_000))
    return {(BUFFERS, "host"): float(weights.itemsize * elements)}


def _gathers(
    config: dict[str, Any], weights: Weights, ranks: int, *, backward: bool, checkpointing: bool = False
) -> Gathers:
    """What is gathered in a pass: nothing where one rank has it all on its device."""
    if ranks == 1 and offload_device(config, "param") == "none":
        return Gathers(0, 0, 0, 0, 0)
    return gathers_of(weights, config["zero_optimization"], backward=backward, checkpointing=checkpointing)


def _gathered(gathers: Gathers, weights: Weights) -> dict[tuple[str, Place], float]:
    """Parameters that are whole for a while, and the collective's buffer out of which the last of them are copied."""
    return {(GATHERED, "device"): float(weights.itemsize * (gathers.live + gathers.largest))}


def _step_temporaries(elements: int, made: float, *, fused: bool) -> float:
    """What an optimizer makes of a group's size while it steps, when it is not fused: torch's Adam two numbers each."""
    return 0.0 if fused else float(made * FLOAT32 * elements)


def _plus(first: Mapping[tuple[str, Place], float], second: Amounts) -> dict[tuple[str, Place], float]:
    return {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {**first, **second}}
