"""A checkpoint taken up under other partitions than it was saved with: other ranks, ZeRO stage, offload or optimizer.

DeepSpeed 0.19 keeps float32 weights and optimizer states in flat partitions, and its own loading wants the very ones
that were saved. Here the partitions of all ranks that saved are read as what they are, stretches of parameters, and
each rank copies those that are its own now. Files are memory-mapped, so a rank reads little more than it keeps. Values
are copied, never computed with: what was saved arrives bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from dsdpo.distributed import all_or_none, world_size
from dsdpo.engine.deepspeed_keys import lookup
from dsdpo.engine.optimizer_limits import optimizer_kind
from dsdpo.engine.quirks.saved_partitions import (
    MASTER,
    MOMENTUM,
    Saved,
    Stretch,
    model_file,
    read_checkpoint,
    read_file,
    within,
)
from dsdpo.errors import CheckpointError

# What decides how DeepSpeed cuts and types the optimizer's states.
LAYOUT = (
    "zero_optimization.stage",
    "zero_optimization.sub_group_size",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.parameter_alignment",
    "zero_optimization.elastic_checkpoint",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.ratio",
    "bf16",
    "fp16.enabled",
    "data_types",
    "optimizer.type",
    "optimizer.params.torch_adam",
)
# Why the states of an optimizer cannot be cut anew.
WHOLE = {
    "adamw_8bit": "optimizer.type adamw_8bit, whose states are kept by blocks of 256 weights of a rank's partition",
}
# Switches of torch's optimizers that choose an implementation: the new run's own stay.
IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable", "maximize")


def same_layout(engine: DeepSpeedEngine, folder: Path) -> bool:
    """True if DeepSpeed itself can load its checkpoint in `folder` into this engine. Collective."""
    with all_or_none():
        model = read_file(model_file(folder))
    return (model["dp_world_size"], cut(model["ds_config"])) == (world_size(), cut(engine.config))


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """What a resolved DeepSpeed config says about partitions."""
    return {key: value for key in LAYOUT if (value := lookup(config, key)) not in (None, False, "none")}


@torch.no_grad()
def load_cut_anew(engine: DeepSpeedEngine, folder: Path) -> None:
    """Put DeepSpeed's checkpoint in `folder` into an engine that cuts its optimizer otherwise. Collective.

    Raises `CheckpointError` for what is not in the files of all ranks, as states on NVMe.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()  # no whole parameter is left behind
    with all_or_none():
        for config in (read_file(model_file(folder))["ds_config"], engine.config):
            check_movable(config, folder)
        saved = read_checkpoint(folder)
        load_optimizer(engine, saved, folder)
        load_progress(engine, saved)
    if hasattr(optimizer, "fp16_groups"):  # stage 3
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def check_movable(config: dict[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` for a config whose states this module cannot move."""
    if reason := why_fixed(config):
        raise _stays(folder, reason)


def why_fixed(config: dict[str, Any]) -> str | None:
    """Why states saved, or to be loaded, under a resolved DeepSpeed config cannot be cut anew; None: they can."""
    return lies_elsewhere(config) or WHOLE.get(optimizer_kind(config))


def lies_elsewhere(config: dict[str, Any]) -> str | None:
    """What of a resolved DeepSpeed config keeps weights or states out of the checkpoint's files, if anything."""
    zero = config.get("zero_optimization", {})
    for what in ("param", "optimizer"):
        if zero.get(f"offload_{what}", {}).get("device") == "nvme":
            return f"offload_{what} on nvme, whose states lie outside the checkpoint's files"
    if zero.get("offload_optimizer", {}).get("ratio", 1) < 1 or zero.get("elastic_checkpoint"):
        return "offload_optimizer.ratio or elastic_checkpoint, whose files leave states out"
    return None


def _stays(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: cannot change ranks, ZeRO stage or offload with {reason}; resume with the ranks and the "
        "DeepSpeed JSON that saved it"
    )


def load_optimizer(engine: DeepSpeedEngine, saved: Saved, folder: Path) -> None:
    """This rank's float32 weights and optimizer states."""
    optimizer = engine.optimizer
    flats, own = _flats(optimizer), list(_own_stretches(engine))
    if odd := sorted(saved.stretches.keys() ^ {name for name, _ in own}):
        raise CheckpointError(
            f"the checkpoint is not of this model: {len(odd)} parameters are trained in one of them only, the first is "
            f"{odd[0]}; resume with the run's own model"
        )
    for flat in flats:
        flat.data.zero_()  # the padding
    for name, mine in own:
        saved.read(name, MASTER, flats[mine.flat].data[mine.offset : mine.offset + mine.count], mine.start)
    if not any(saved.states_of(name) for name, _ in own):
        return  # no update was made before the checkpoint
    if hasattr(optimizer, "fp16_groups"):
        optimizer._set_fp32_optimizer_param_groups()  # where its parameters only are while it steps
    inner = optimizer.optimizer
    if len(inner.param_groups) != len(saved.groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved.groups)} groups of parameters and this run's has "
            f"{len(inner.param_groups)}: optimizer.weight_decay must be zero in both or in neither"
        )
    order = {id(p): index for index, p in enumerate(p for group in inner.param_groups for p in group["params"])}
    groups = [
        {**now, **{key: value for key, value in then.items() if key not in IMPLEMENTATION}}
        for now, then in zip(inner.param_groups, saved.groups, strict=True)
    ]
    for group in groups:
        group["params"] = [order[id(parameter)] for parameter in group["params"]]
    states = {
        order[id(flat)]: _states(engine, saved, index, [entry for entry in own if entry[1].flat == index], folder)
        for index, flat in enumerate(flats)
    }
    inner.load_state_dict({"state": states, "param_groups": groups})
    if hasattr(optimizer, "fp16_groups"):
        optimizer._clear_fp32_optimizer_param_groups()


def _states(
    engine: DeepSpeedEngine, saved: Saved, index: int, own: list[tuple[str, Stretch]], folder: Path
) -> dict[str, Any]:
    """What the optimizer keeps for this rank's partition number `index`, whose parameters are `own`."""
    optimizer, flat = engine.optimizer, _flats(engine.optimizer)[index]
    names = saved.states_of(own[0][0])
    if any(saved.states_of(name) != names for name, _ in own):
        raise _stays(folder, "an optimizer that keeps other states for some parameters than for others")
    states = {}
    for key in names:
        called = _own_name(optimizer.optimizer, key)
        if called is None:
            continue
        if key == MOMENTUM and _keeps_matrices(optimizer):
            matrices = [(engine.param_names[p], p.numel()) for p in optimizer.params_in_partition[index]]
            states[called] = torch.zeros(sum(numel for _, numel in matrices), dtype=flat.dtype, device=flat.device)
            for (name, _), whole in zip(matrices, states[called].split([numel for _, numel in matrices]), strict=True):
                saved.read(name, key, whole, 0)
            continue
        states[called] = torch.zeros_like(flat, requires_grad=False)
        for name, mine in own:
            saved.read(name, key, states[called][mine.offset : mine.offset + mine.count], mine.start)
    constants = dict(saved.constants[saved.stretches[own[0][0]][0][1].flat])
    if "step" in constants:  # of which torch's optimizers make tensors again, but not within Muon
        aux = getattr(optimizer.optimizer, "aux_optimizer", None)
        step = int(constants["step"])
        constants["step"] = torch.tensor(float(step)) if isinstance(aux, torch.optim.AdamW) else step
    return constants | states


def _keeps_matrices(optimizer: Any) -> bool:
    """Whether a rank keeps Muon's momentum for each whole matrix of which it has a part of the weights."""
    at_1_or_2 = hasattr(optimizer, "params_in_partition")
    return at_1_or_2 and not optimizer.cpu_offload and "muon" in type(optimizer.optimizer).__name__.lower()


def _own_name(optimizer: torch.optim.Optimizer, name: str) -> str | None:
    """What an optimizer calls a state that another implementation of it has saved; None where it has no use for it."""
    kind = type(optimizer).__name__
    if kind == "Lion32bit":  # of bitsandbytes
        return {"exp_avg": "state1", "exp_avg_sq": None}.get(name, name)
    if kind == "DeepSpeedCPULion":
        return {"state1": "exp_avg"}.get(name, name)
    return name


def _flats(optimizer: Any) -> list[Tensor]:
    """This rank's partitions of float32 weights: of stage 3, of 1 and 2, of BF16_Optimizer (stage 1 in bfloat16)."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise CheckpointError(f"{type(optimizer).__name__} of this DeepSpeed keeps its weights in a way unknown here")


def _own_stretches(engine: DeepSpeedEngine) -> Iterator[tuple[str, Stretch]]:
    """Every parameter of which this rank has a part, and where."""
    optimizer, names = engine.optimizer, engine.param_names
    if hasattr(optimizer, "fp16_groups"):  # stage 3
        for flat, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                part = int(parameter.ds_tensor.ds_numel)
                start = part * torch.distributed.get_rank(parameter.ds_process_group)
                yield names[parameter], Stretch(flat, offset, start, max(0, min(part, parameter.ds_numel - start)))
                offset += part
        return
    # In the order in which they are strung together, which round_robin_gradients changes.
    groups = getattr(optimizer, "round_robin_bit16_groups", None) or optimizer.bf16_groups
    for flat, (group, values) in enumerate(zip(groups, _flats(optimizer), strict=True)):
        border = values.numel() * torch.distributed.get_rank(optimizer.real_dp_process_group[flat])
        ends = accumulate(parameter.numel() for parameter in group)
        offsets = getattr(optimizer, "round_robin_bit16_offsets", None)
        starts = offsets[flat] if offsets else [end - p.numel() for end, p in zip(ends, group, strict=True)]
        for parameter, start in zip(group, starts, strict=True):
            yield names[parameter], within(flat, start, parameter.numel(), border, values.numel())


def load_progress(engine: DeepSpeedEngine, saved: Saved) -> None:
    """Schedule, counters, the loss scale of float16 and the module's buffers."""
    model, optimizer = saved.model, engine.optimizer
    if engine.lr_scheduler is not None and model["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, model[name])
    if saved.scaler is not None and type(getattr(optimizer, "loss_scaler", None)) is type(saved.scaler):
        optimizer.loss_scaler = saved.scaler
    for name, buffer in engine.module.named_buffers():
        if name in model["buffer_names"]:
            buffer.copy_(model["module"][name])
