"""Everything about how parameters are partitioned: reading whole tensors out of any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
from torch import Tensor, nn

GATHER_BYTES = 512 * 2**20


def is_partitioned(parameter: Any) -> bool:
    """True for a ZeRO-3 parameter, of which this rank holds a shard only."""
    return hasattr(parameter, "ds_id")


def full_numel(parameter: Any) -> int:
    """Number of elements of the whole parameter, whatever this rank holds of it."""
    return int(parameter.ds_numel) if is_partitioned(parameter) else parameter.numel()


def gather_groups(module: nn.Module, *, budget_bytes: int = GATHER_BYTES) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """The module's named parameters in groups that stay under `budget_bytes` when whole; a larger one comes alone."""
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in module.named_parameters():
        bytes_whole = full_numel(parameter) * parameter.element_size()
        if group and size + bytes_whole > budget_bytes:
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += bytes_whole
    if group:
        yield group


def whole_state_dict(module: nn.Module, *, keep: bool, budget_bytes: int = GATHER_BYTES) -> dict[str, Tensor] | None:
    """The module's state on the CPU, whole, on ranks that `keep` it; None elsewhere. Collective.

    Parameters are gathered a bounded group at a time, so no rank ever holds two copies of the model and only ranks
    with `keep` hold one. Tied parameters appear under each of their names and share memory.
    """
    state: dict[str, Tensor] = {}
    for group in gather_groups(module, budget_bytes=budget_bytes):
        parameters = [parameter for _, parameter in group]
        with deepspeed.zero.GatheredParameters([p for p in parameters if is_partitioned(p)], modifier_rank=None):
            if keep:
                for name, parameter in group:
                    state[name] = parameter.detach().to("cpu", copy=True)
    if not keep:
        return None
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        state.setdefault(name, state[names[id(parameter)]])
    for name, buffer in module.state_dict(keep_vars=True).items():
        if not isinstance(buffer, nn.Parameter):
            state[name] = buffer.detach().to("cpu", copy=True)
    return state


def parameter_count(module: nn.Module) -> int:
    """Number of elements of the whole model, tied ones once."""
    return sum(full_numel(parameter) for parameter in module.parameters())
