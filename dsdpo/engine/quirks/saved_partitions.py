"""What the files of a DeepSpeed checkpoint hold: the partitions of all ranks as stretches of parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdpo.console import counted
from dsdpo.engine.deepspeed_keys import lookup
from dsdpo.engine.optimizer_limits import OFFLOAD, optimizer_kind
from dsdpo.errors import CheckpointError

MASTER = "float32 weights"  # beside the names of optimizer states
WRAPPED = "__bnb_optimizer_quant_state__"
# Muon's, kept for whole matrices at stages 1 and 2 on the device, elsewhere cut as the weights are (DeepSpeed 0.19).
MOMENTUM = "momentum_buffer"


@dataclass(frozen=True)
class Stretch:
    """Consecutive elements of a parameter in a flat partition."""

    flat: int  # which partition of its rank
    offset: int  # of the first element there
    start: int  # of the first element in the whole parameter
    count: int


Stretches = dict[str, list[tuple[int, Stretch]]]  # by parameter: of which rank, and where


@dataclass(frozen=True)
class Saved:
    """What the ranks of a checkpoint kept, with the tensors still in their files."""

    values: list[list[dict[str, Tensor]]]  # [rank][flat] -> MASTER and element-wise optimizer states, by name
    stretches: Stretches  # of the weights, and of states that are cut as those are
    matrices: Stretches | None  # of MOMENTUM where it is kept for whole matrices
    constants: list[dict[str, Any]]  # [flat] -> what the optimizer keeps beside them, such as its count of steps
    groups: list[dict[str, Any]]  # hyperparameters of the optimizer's parameter groups
    model: dict[str, Any]  # progress and schedule
    scaler: Any  # of the loss, for float16

    def read(self, name: str, key: str, target: Tensor, start: int) -> None:
        """Fill `target` with the elements of a parameter, or of a state of it, from `start` on."""
        places = self.stretches if self.matrices is None or key != MOMENTUM else self.matrices
        missing = target.numel()
        for rank, part in places.get(name, ()):
            first, end = max(start, part.start), min(start + target.numel(), part.start + part.count)
            if first < end:
                source = self.values[rank][part.flat][key].view(-1)
                place = part.offset + first - part.start
                target[first - start : end - start].copy_(source[place : place + end - first])
                missing -= end - first
        if missing:
            raise CheckpointError(
                f"the checkpoint is not of this model: {missing} elements are missing of the {key} of {name}; resume "
                "with the run's own model"
            )

    def states_of(self, name: str) -> list[str]:
        """What the optimizer keeps for a parameter beside its weights."""
        rank, part = next((rank, part) for rank, part in self.stretches[name] if part.count)
        return [key for key in self.values[rank][part.flat] if key != MASTER]


def read_checkpoint(folder: Path) -> Saved:
    """The checkpoint of all ranks, memory-mapped."""
    model = read_file(model_file(folder))
    optimizers = [read_file(path)["optimizer_state_dict"] for path in optimizer_files(folder, model["dp_world_size"])]
    third = "fp32_flat_groups" in optimizers[0]
    inner = "optimizer_state_dict" if third else "base_optimizer_state"
    shapes = model["param_shapes"]
    values: list[list[dict[str, Tensor]]] = []
    constants: list[dict[str, Any]] = []
    for states in optimizers:
        masters = states["fp32_flat_groups" if third else "single_partition_of_fp32_groups"]
        flats = []
        for index, master in enumerate(masters):
            state = _unwrapped(states[inner]["state"].get(index, {}))
            flats.append({MASTER: master.view(-1)} | {k: v for k, v in state.items() if _is_elementwise(v)})
            if len(values) == 0:
                constants.append({name: value for name, value in state.items() if not _is_elementwise(value)})
        values.append(flats)
    stretches = _stretches_3(shapes, len(values)) if third else _stretches_1_and_2(shapes, optimizers)
    return Saved(
        values=values,
        stretches=stretches,
        matrices=_whole_matrices(shapes, stretches) if _keeps_matrices(model["ds_config"], optimizers[0]) else None,
        constants=constants,
        groups=optimizers[0][inner]["param_groups"],
        model=model,
        scaler=optimizers[0].get("loss_scaler"),
    )


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """One partition's states with those in it that bitsandbytes packs into a block of their own (0.50)."""
    return {**{k: v for k, v in state.items() if k != WRAPPED}, **state.get(WRAPPED, {})}


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _stretches_3(shapes: list[dict[str, torch.Size]], ranks: int) -> Stretches:
    """Stage 3 cuts every parameter into equal parts, the last of them padded, and strings a rank's parts together."""
    stretches: Stretches = {}
    for flat, group in enumerate(shapes):
        offset = 0
        for name, shape in group.items():
            part = -(-shape.numel() // ranks)
            for rank in range(ranks):
                count = max(0, min(part, shape.numel() - rank * part))
                stretches.setdefault(name, []).append((rank, Stretch(flat, offset, rank * part, count)))
            offset += part
    return stretches


def _stretches_1_and_2(shapes: list[dict[str, torch.Size]], optimizers: list[dict[str, Any]]) -> Stretches:
    """Stages 1 and 2 string all parameters together and cut the whole into equal parts.

    DeepSpeed's own `param_slice_mappings` say something else under round_robin_gradients, and are wrong (0.19.8).
    """
    stretches: Stretches = {}
    first = optimizers[0]
    for flat, group in enumerate(shapes):
        size = first["single_partition_of_fp32_groups"][flat].numel()
        if "zero_stage" in first:  # which BF16_Optimizer leaves out, as it does not cut off the padding
            size += first["group_paddings"][flat]
        gaps = first["param_alignment_paddings"][flat] if "param_alignment_paddings" in first else [0] * len(group)
        offset = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            stretches[name] = [
                (rank, within(flat, offset, shape.numel(), rank * size, size)) for rank in range(len(optimizers))
            ]
            offset += shape.numel() + gap
    return stretches


def _keeps_matrices(config: dict[str, Any], states: dict[str, Any]) -> bool:
    """Whether a rank kept MOMENTUM for each whole matrix of which it had a part of the weights."""
    if optimizer_kind(config) != "muon" or lookup(config, OFFLOAD) not in (None, "none"):
        return False
    # Stage 3 and BF16_Optimizer (which leaves zero_stage out) cut everything as the weights.
    return "fp32_flat_groups" not in states and "zero_stage" in states


def _whole_matrices(shapes: list[dict[str, torch.Size]], stretches: Stretches) -> Stretches:
    """Where each rank keeps whole what of each matrix it has a part of the weights: one after the other."""
    found: Stretches = {}
    for flat, group in enumerate(shapes):
        ends: dict[int, int] = {}  # by rank
        for name, shape in group.items():
            for rank, part in stretches[name]:
                if part.count:
                    whole = Stretch(flat, ends.get(rank, 0), 0, shape.numel())
                    ends[rank] = whole.offset + whole.count
                    found.setdefault(name, [(rank, whole)])  # all ranks have the same
    return found


def within(flat: int, offset: int, count: int, border: int, size: int) -> Stretch:
    """What of a parameter at `offset` of all partitions strung together lies in the one that starts at `border`."""
    first, end = max(offset, border), min(offset + count, border + size)
    return Stretch(flat, first - border, first - offset, max(0, end - first))


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
