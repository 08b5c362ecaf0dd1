"""All weights of a ZeRO-3 engine on every rank for a while: gathered once for passes that then gather nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from dsdpo.console import launched
from dsdpo.distributed import max_over_ranks
from dsdpo.engine.build import device
from dsdpo.engine.shards import is_partitioned, size_for_gathering
from dsdpo.engine.types import InferenceEngine

SHARE = 0.5  # of a rank's free memory that whole weights may take; the rest is for what is computed with them


def is_sharded(engine: InferenceEngine) -> bool:
    """True for an engine whose weights are partitioned: ZeRO-3."""
    return any(map(is_partitioned, engine.module.parameters()))


def fits_whole(engine: InferenceEngine) -> bool:
    """Whether every rank has room for the engine's whole weights beside what it holds. Collective."""
    size = sum(map(size_for_gathering, _missing(engine.module)))
    return not max_over_ranks(int(not size <= SHARE * free_memory()), device())


def free_memory() -> float:
    """Bytes that this rank may still take: of its device's memory, else its part of the host's."""
    if device().type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + unused)
    return float(get_accelerator().available_memory()) / launched().local_size


@contextmanager
def whole_weights(engine: InferenceEngine) -> Iterator[None]:
    """A block of passes without gradient in which every rank holds all of the engine's weights. Collective.

    DeepSpeed's hooks on the modules, which would release each layer's weights behind it, are out of the way meanwhile,
    so that its record of gathers does not notice the block; what was gathered before, such as small parameters that
    stay so, is afterwards. Under other stages than 3 nothing is done.
    """
    parameters = _missing(engine.module)
    if not parameters:
        yield
        return
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None), _without_hooks(engine.module):
        yield


def _missing(module: nn.Module) -> list[Any]:
    """The parameters of which this rank holds a shard only."""
    parameters: list[Any] = [parameter for parameter in module.parameters() if is_partitioned(parameter)]
    return [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """A block in which no forward hook of the module or a part of it is called."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(part, {name: vars(part)[name] for name in names}) for part in module.modules()]
    for part, _ in kept:
        vars(part).update({name: OrderedDict() for name in names})
    try:
        yield
    finally:
        for part, hooks in kept:
            vars(part).update(hooks)
