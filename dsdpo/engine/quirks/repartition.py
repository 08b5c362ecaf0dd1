"""A checkpoint taken up under other partitions than it was saved with: other ranks, ZeRO stage, offload or optimizer.

DeepSpeed 0.19 keeps float32 weights and optimizer states in flat partitions, and its own loading wants the very ones
that were saved. Here the partitions of all ranks that saved are read as what they are, stretches of parameters, and
each rank copies those that are its own now. Files are memory-mapped, so a rank reads little more than it keeps. Values
are copied, never computed with: what was saved arrives bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdpo.console import counted
from dsdpo.distributed import all_or_none, world_size
from dsdpo.engine.deepspeed_keys import lookup
from dsdpo.engine.optimizer_limits import optimizer_kind
from dsdpo.errors import CheckpointError

MASTER = "float32 weights"  # beside the names of optimizer states
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
WRAPPED = "__bnb_optimizer_quant_state__"
# Why the states of an optimizer cannot be cut anew.
WHOLE = {
    "muon": "optimizer.type muon, whose states DeepSpeed keeps by matrices at some stages",
    "adamw_8bit": "optimizer.type adamw_8bit, whose states are kept by blocks of 256 weights of a rank's partition",
}
# Switches of torch's optimizers that choose an implementation: the new run's own stay.
IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable", "maximize")


@dataclass(frozen=True)
class Stretch:
    """Consecutive elements of a parameter in a flat partition."""

    flat: int  # which partition of its rank
    offset: int  # of the first element there
    start: int  # of the first element in the whole parameter
    count: int


@dataclass(frozen=True)
class Saved:
    """What the ranks of a checkpoint kept, with the tensors still in their files."""

    values: list[list[dict[str, Tensor]]]  # [rank][flat] -> MASTER and element-wise optimizer states, by name
    stretches: dict[str, list[tuple[int, Stretch]]]  # by parameter: of which rank, and where
    constants: dict[str, Any]  # what the optimizer keeps beside them, such as its count of steps
    groups: list[dict[str, Any]]  # hyperparameters of the optimizer's parameter groups
    model: dict[str, Any]  # progress and schedule
    scaler: Any  # of the loss, for float16


def same_layout(engine: Any, folder: Path) -> bool:
    """True if DeepSpeed itself can load its checkpoint in `folder` into this engine. Collective."""
    with all_or_none():
        model = read_file(model_file(folder))
    return (model["dp_world_size"], cut(model["ds_config"])) == (world_size(), cut(engine.config))


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """What a resolved DeepSpeed config says about partitions."""
    return {key: value for key in LAYOUT if (value := lookup(config, key)) not in (None, False, "none")}


@torch.no_grad()
def load_cut_anew(engine: Any, folder: Path) -> None:
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
        flats = [flat for rank in saved.values for flat in rank]
        if any(flat.keys() != flats[0].keys() for flat in flats):
            raise _stays(folder, "an optimizer that keeps other states for some parameters than for others")
        load_optimizer(engine, saved)
        load_progress(engine, saved)
    if hasattr(optimizer, "fp16_groups"):  # stage 3
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def check_movable(config: dict[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` for a config whose states this module cannot move."""
    if reason := lies_elsewhere(config) or WHOLE.get(optimizer_kind(config)):
        raise _stays(folder, reason)


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


def read_checkpoint(folder: Path) -> Saved:
    """The checkpoint of all ranks, memory-mapped."""
    model = read_file(model_file(folder))
    optimizers = [read_file(path)["optimizer_state_dict"] for path in optimizer_files(folder, model["dp_world_size"])]
    third = "fp32_flat_groups" in optimizers[0]
    inner = "optimizer_state_dict" if third else "base_optimizer_state"
    shapes = model["param_shapes"]
    values, constants = [], []
    for states in optimizers:
        masters = states["fp32_flat_groups" if third else "single_partition_of_fp32_groups"]
        flats = []
        for index, master in enumerate(masters):
            state = _unwrapped(states[inner]["state"].get(index, {}))
            flats.append({MASTER: master.view(-1)} | {k: v for k, v in state.items() if _is_elementwise(v)})
            constants.append({name: value for name, value in state.items() if not _is_elementwise(value)})
        values.append(flats)
    return Saved(
        values=values,
        stretches=_stretches_3(shapes, len(values)) if third else _stretches_1_and_2(shapes, optimizers),
        constants=constants[0],
        groups=optimizers[0][inner]["param_groups"],
        model=model,
        scaler=optimizers[0].get("loss_scaler"),
    )


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """One partition's states with those in it that bitsandbytes packs into a block of their own (0.50)."""
    return {**{k: v for k, v in state.items() if k != WRAPPED}, **state.get(WRAPPED, {})}


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _stretches_3(shapes: list[dict[str, torch.Size]], ranks: int) -> dict[str, list[tuple[int, Stretch]]]:
    """Stage 3 cuts every parameter into equal parts, the last of them padded, and strings a rank's parts together."""
    stretches: dict[str, list[tuple[int, Stretch]]] = {}
    for flat, group in enumerate(shapes):
        offset = 0
        for name, shape in group.items():
            part = -(-shape.numel() // ranks)
            for rank in range(ranks):
                count = max(0, min(part, shape.numel() - rank * part))
                stretches.setdefault(name, []).append((rank, Stretch(flat, offset, rank * part, count)))
            offset += part
    return stretches


def _stretches_1_and_2(
    shapes: list[dict[str, torch.Size]], optimizers: list[dict[str, Any]]
) -> dict[str, list[tuple[int, Stretch]]]:
    """Stages 1 and 2 string all parameters together and cut the whole into equal parts.

    DeepSpeed's own `param_slice_mappings` say something else under round_robin_gradients, and are wrong (0.19.8).
    """
    stretches: dict[str, list[tuple[int, Stretch]]] = {}
    first = optimizers[0]
    for flat, group in enumerate(shapes):
        size = first["single_partition_of_fp32_groups"][flat].numel()
        if "zero_stage" in first:  # which BF16_Optimizer leaves out, as it does not cut off the padding
            size += first["group_paddings"][flat]
        gaps = first["param_alignment_paddings"][flat] if "param_alignment_paddings" in first else [0] * len(group)
        offset = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            stretches[name] = [
                (rank, _within(flat, offset, shape.numel(), rank * size, size)) for rank in range(len(optimizers))
            ]
            offset += shape.numel() + gap
    return stretches


def _within(flat: int, offset: int, count: int, border: int, size: int) -> Stretch:
    """What of a parameter at `offset` of all partitions strung together lies in the one that starts at `border`."""
    first, end = max(offset, border), min(offset + count, border + size)
    return Stretch(flat, first - border, first - offset, max(0, end - first))


def load_optimizer(engine: Any, saved: Saved) -> None:
    """This rank's float32 weights and optimizer states."""
    optimizer = engine.optimizer
    flats, own = _flats(optimizer), list(_own_stretches(engine))
    if odd := sorted(saved.stretches.keys() ^ {name for name, _ in own}):
        raise CheckpointError(
            f"the checkpoint is not of this model: {len(odd)} parameters are trained in one of them only, the first is "
            f"{odd[0]}; resume with the run's own model"
        )
    called = {name: _own_name(optimizer.optimizer, name) for name in saved.values[0][0] if name != MASTER}
    names = [name for name in called if called[name] is not None]
    states = [{name: torch.zeros_like(flat) for name in names} for flat in flats]
    for flat in flats:
        flat.data.zero_()  # the padding
    for name, mine in own:
        for key in (MASTER, *names):
            target = flats[mine.flat] if key == MASTER else states[mine.flat][key]
            _copy(saved, name, key, target.data[mine.offset : mine.offset + mine.count], mine.start)
    if not names:
        return  # no update was made before the checkpoint
    if hasattr(optimizer, "fp16_groups"):
        optimizer._set_fp32_optimizer_param_groups()  # where its parameters only are while it steps
    inner = optimizer.optimizer
    if len(inner.param_groups) != len(saved.groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved.groups)} groups of parameters and this run's has "
            f"{len(inner.param_groups)}: optimizer.weight_decay must be zero in both or in neither"
        )
    constants = dict(saved.constants)
    if "step" in constants:
        constants["step"] = int(constants["step"])  # of which torch's optimizers make tensors again
    order = {id(p): index for index, p in enumerate(p for group in inner.param_groups for p in group["params"])}
    groups = [
        {**now, **{key: value for key, value in then.items() if key not in IMPLEMENTATION}}
        for now, then in zip(inner.param_groups, saved.groups, strict=True)
    ]
    for group in groups:
        group["params"] = [order[id(parameter)] for parameter in group["params"]]
    state = {
        order[id(flat)]: {**constants, **{called[name]: value for name, value in values.items()}}
        for flat, values in zip(flats, states, strict=True)
    }
    inner.load_state_dict({"state": state, "param_groups": groups})
    if hasattr(optimizer, "fp16_groups"):
        optimizer._clear_fp32_optimizer_param_groups()


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


def _own_stretches(engine: Any) -> Iterator[tuple[str, Stretch]]:
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
            yield names[parameter], _within(flat, start, parameter.numel(), border, values.numel())


def _copy(saved: Saved, name: str, key: str, target: Tensor, start: int) -> None:
    """Fill `target` with the elements of a parameter from `start` on."""
    missing = target.numel()
    for rank, part in saved.stretches.get(name, ()):
        first, end = max(start, part.start), min(start + target.numel(), part.start + part.count)
        if first < end:
            source = saved.values[rank][part.flat][key].view(-1)
            place = part.offset + first - part.start
            target[first - start : end - start].copy_(source[place : place + end - first])
            missing -= end - first
    if missing:
        raise CheckpointError(
            f"the checkpoint is not of this model: {missing} elements are missing of the {key} of {name}; resume with "
            "the run's own model"
        )


def load_progress(engine: Any, saved: Saved) -> None:
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


def model_file(folder: Path) -> Path:
    """DeepSpeed's file of rank 0 with everything that is not the optimizer's."""
    whole, third = folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    return third if third.exists() else whole


def optimizer_files(folder: Path, ranks: int) -> list[Path]:
    """DeepSpeed's files of optimizer states, by rank."""
    found = {}
    for path in folder.glob("*_optim_states.pt"):
        if match := re.fullmatch(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt", path.name):
            found[int(match[1])] = path
    if sorted(found) != list(range(ranks)):
        raise CheckpointError(
            f"{folder}: optimizer states of ranks {sorted(found)}, but {counted(ranks, 'rank')} saved it"
        )
    return [found[rank] for rank in range(ranks)]


def read_file(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, its tensors memory-mapped; a pickle, so only for files whose checksums are known."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
