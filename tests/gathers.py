"""What ZeRO-3 gathers, step by step: counted inside DeepSpeed's coordinators, on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from torch import nn

INVALIDATE, FETCH = "_invalidate_trace", "_fetch_sub_module_impl"
GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Events of all coordinators of this process within the block.

    `invalidated`: records of the order of gathers that were thrown away. `gathered`: parameters made whole. `late`:
    those of them that a module had to wait for from the start, because nobody had sent for them ahead.
    """
    events: Counter[str] = Counter()
    kept = {name: getattr(PartitionedParameterCoordinator, name) for name in (INVALIDATE, FETCH, GATHER)}

    def invalidate(self: Any) -> None:
        events["invalidated"] += 1
        kept[INVALIDATE](self)

    def fetch(self: Any, module: nn.Module, forward: bool, is_leaf: bool) -> None:
        events["late"] += missing(set(iter_params(module, recurse=is_leaf)))
        kept[FETCH](self, module, forward, is_leaf)

    def gather(self: Any, parameters: set[Any], forward: bool, quantize: bool = False) -> None:
        events["gathered"] += missing(parameters)
        kept[GATHER](self, parameters, forward, quantize)

    for name, function in ((INVALIDATE, invalidate), (FETCH, fetch), (GATHER, gather)):
        setattr(PartitionedParameterCoordinator, name, function)
    try:
        yield events
    finally:
        for name, function in kept.items():
            setattr(PartitionedParameterCoordinator, name, function)


def missing(parameters: set[Any]) -> int:
    """How many of these this rank holds a shard of only, with nothing on its way."""
    return sum(parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE for parameter in parameters)


def hooks(module: nn.Module) -> int:
    """The number of hooks on all modules together."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


def gathered_now(module: nn.Module) -> int:
    """Elements that this rank holds whole."""
    return sum(
        parameter.ds_numel for parameter in module.parameters() if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE
    )
