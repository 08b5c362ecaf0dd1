"""Everything about how parameters are partitioned: reading whole tensors out of any ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from torch import Tensor, nn

from dsdpo.distributed import gather_objects, rank, world_size
from dsdpo.engine.quantization import is_quantized, meant_shape, scales

GATHER_BYTES = 512 * 2**20


def is_partitioned(parameter: Any) -> bool:
    """True for a ZeRO-3 parameter, of which this rank holds a shard only."""
    return hasattr(parameter, "ds_id")


def full_numel(parameter: Any) -> int:
    """Number of elements of the whole parameter, whatever this rank holds of it."""
    return int(parameter.ds_numel) if is_partitioned(parameter) else parameter.numel()


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole parameter, whatever this rank holds of it; of a quantized one, as it was before."""
    if is_quantized(parameter):
        return meant_shape(parameter)
    return tuple(parameter.ds_shape) if is_partitioned(parameter) else tuple(parameter.shape)


def is_on_nvme(parameter: Any) -> bool:
    """True for a ZeRO-3 shard that is read from a file when it is gathered."""
    return is_partitioned(parameter) and parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme


def size_for_gathering(parameter: Any) -> float:
    """Bytes of the whole parameter; beyond any budget for one on NVMe, which DeepSpeed has few buffers to read into."""
    return math.inf if is_on_nvme(parameter) else full_numel(parameter) * parameter.element_size()


def gather_groups(
    module: nn.Module, *, budget_bytes: int = GATHER_BYTES, only: Container[str] | None = None
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """The module's named parameters in groups that stay under `budget_bytes` when whole; a larger one comes alone.

    `only` these names, None: all.
    """
    group: list[tuple[str, nn.Parameter]] = []
    size = 0.0
    for name, parameter in module.named_parameters():
        if only is not None and name not in only:
            continue
        size_whole = size_for_gathering(parameter)
        if group and size + size_whole > budget_bytes:
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += size_whole
    if group:
        yield group


def whole_state_dict(
    module: nn.Module, *, keep: bool, budget_bytes: int = GATHER_BYTES, only: Container[str] | None = None
) -> dict[str, Tensor] | None:
    """The module's state on the CPU, whole, on ranks that `keep` it; None elsewhere. Collective.

    Parameters are gathered a bounded group at a time, so no rank ever holds two copies of the model and only ranks
    with `keep` hold one. Tied parameters appear under each of their names and share memory. With `only`, it is these
    parameters and no buffers.
    """
    state: dict[str, Tensor] = {}
    for group in gather_groups(module, budget_bytes=budget_bytes, only=only):
        parameters = [parameter for _, parameter in group]
        with deepspeed.zero.GatheredParameters([p for p in parameters if is_partitioned(p)], modifier_rank=None):
            if keep:
                for name, parameter in group:
                    state[name] = parameter.detach().to("cpu", copy=True)
    if not keep:
        return None
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if only is None or name in only:
            state.setdefault(name, state[names[id(parameter)]])
    if only is not None:
        return state
    for name, buffer in module.state_dict(keep_vars=True).items():
        if not isinstance(buffer, nn.Parameter):
            state[name] = buffer.detach().to("cpu", copy=True)
    return state


def parameter_count(module: nn.Module) -> int:
    """Number of elements of the whole model, tied ones once."""
    return sum(math.prod(full_shape(parameter)) for parameter in module.parameters())


def nonfinite_parameters(module: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity, on any rank, in the module's order. Collective."""
    flags = {}
    for name, parameter in module.named_parameters():
        if is_on_nvme(parameter) or is_quantized(parameter):
            continue
        own = own_elements(parameter)[0] if is_partitioned(parameter) else parameter.detach()
        if own.numel():
            flags[name] = own.isfinite().all()  # nobody waits for it yet
    found = {name for names in gather_objects([n for n, flag in flags.items() if not flag]) for name in names}
    return [name for name, _ in module.named_parameters() if name in found]


def own_elements(parameter: Any) -> tuple[Tensor, int]:
    """This rank's part of a ZeRO-3 parameter, flat, and the place of its first element in the whole.

    Without the padding that makes all ranks' parts equally long: nobody writes that, so it holds whatever lay in that
    memory before, NaN included.
    """
    shard: Tensor = parameter.ds_tensor.detach().view(-1)
    start = shard.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    return shard[: max(0, min(shard.numel(), parameter.ds_numel - start))], start


def has_frozen(module: nn.Module) -> bool:
    """True if some parameters do not train."""
    return any(not parameter.requires_grad for parameter in module.parameters())


def release_gathered(engine: DeepSpeedEngine) -> None:
    """Make a ZeRO-3 engine forget every whole parameter it still holds, small persistent ones included.

    To be called before shards are written: a forward pass would otherwise go on reading the old whole copy. No
    communication, and prefetching keeps its record (DeepSpeed 0.19).
    """
    if hasattr(engine.optimizer, "empty_partition_cache"):
        engine.optimizer.empty_partition_cache()


def finish_writes() -> None:
    """Wait until what was written to shards is there for the next forward.

    ZeRO-3 gathers on a stream of its own, which does not wait for the one that writes (DeepSpeed 0.19,
    `overlap_comm`). One wait per sync or resume; a CPU has nothing to wait for.
    """
    get_accelerator().synchronize()


@contextmanager
def writable_shard(parameter: Any) -> Iterator[tuple[Tensor, int]]:
    """This rank's part of a parameter as a flat view to write through, and where it starts in the whole.

    Works for whole parameters, ZeRO-3 shards (padding left out) and shards on CPU or NVMe. Nothing of the parameter
    may be gathered meanwhile: see `release_gathered`.
    """
    if not is_partitioned(parameter):
        yield parameter.data.view(-1), 0
        return
    on_nvme = is_on_nvme(parameter)
    if on_nvme and parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield own_elements(parameter)
    # hpZ keeps a second copy within the node, which its forward reads; without it, it is made anew from the first.
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.ds_secondary_tensor = None
    if on_nvme:
        parameter.nvme_swapper.swap_out_and_release([parameter])


@dataclass(frozen=True)
class MergedWeight:
    """A linear layer's weight with its LoRA factors multiplied in: base + scaling · B A, made when it is read."""

    base: Any  # (out, in)
    factor_a: Any  # (rank, in)
    factor_b: Any  # (out, rank)
    scaling: float


def parts_of(source: Any) -> tuple[Any, ...]:
    """The parameters that a source of values is made of: one, or those of a `MergedWeight`, the largest first."""
    if isinstance(source, MergedWeight):
        return source.base, source.factor_a, source.factor_b
    return (source,)


def bytes_whole(source: Any) -> int:
    """Size of all that must be whole for a source to be read."""
    return sum(full_numel(part) * part.element_size() for part in parts_of(source))


def is_local(source: Any, target: Any) -> bool:
    """True if each rank already holds the newest values of `source` for its own part of `target`.

    So with ZeRO-3 shards cut alike, and with a whole float32 source. A whole 16-bit source does not count: the
    optimizer's float32 values of it are spread over ranks.
    """
    if isinstance(source, MergedWeight):
        return False
    if not is_partitioned(source):
        return source.dtype == torch.float32 or not _has_master(source)
    if is_on_nvme(source) and not (source.requires_grad and _has_master(source)):
        return False
    # Not numel(), which is that of a placeholder while a shard lies on NVMe.
    return is_partitioned(target) and source.ds_tensor.ds_numel == target.ds_tensor.ds_numel


@contextmanager
def readable(sources: Sequence[Any], *, local: bool) -> Iterator[Callable[[Any, int, int], Tensor]]:
    """A function (source, start, count) -> flat newest values of one of `sources`: float32 where an optimizer has them.

    With `local` (see `is_local`) nothing is communicated; `start` must then be where this rank's part starts. Else
    parameters become whole for the time of the block, or one by one where it is the optimizer's values that are
    assembled, and all ranks must ask for the same sources in the same order. Collective then.
    """
    if local:
        yield _local_values
        return
    parts = [part for source in sources for part in parts_of(source)]
    plain = [part for part in parts if is_partitioned(part) and not (part.requires_grad and _has_master(part))]

    def whole(part: Any) -> Tensor:
        return safe_get_full_fp32_param(part) if part.requires_grad and _has_master(part) else part.data

    def values(source: Any, start: int, count: int) -> Tensor:
        first, *factors = map(whole, parts_of(source))
        if factors:
            factor_a, factor_b = factors
            first = first.float() + source.scaling * (factor_b.float() @ factor_a.float())
        return first.reshape(-1)[start : start + count]

    with deepspeed.zero.GatheredParameters(plain, modifier_rank=None):
        yield values


def _local_values(source: Any, start: int, count: int) -> Tensor:
    if not is_partitioned(source):
        return source.data.view(-1)[start : start + count]
    master = safe_get_local_fp32_param(source) if source.requires_grad and _has_master(source) else None
    return (source.ds_tensor.data if master is None else master).view(-1)[:count]


def _has_master(parameter: Any) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def local_shards(module: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """This rank's share of every parameter and saved buffer: name, flat elements, the first one's place in the whole.

    Scales of quantized weights come last, for without them packed bits have no size.
    The shares of all ranks make every tensor exactly once: ZeRO-3 shards without their padding, and equal slices of
    what each rank holds whole. A shard on NVMe is there only until the next one is asked for.
    """
    parameter: Any
    for name, parameter in module.named_parameters():
        if not is_partitioned(parameter):
            yield name, *_own_slice(parameter.detach())
            continue
        away = parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
        if away:
            parameter.nvme_swapper.swap_in([parameter], async_op=False)
        yield name, *own_elements(parameter)
        if away:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), *_own_slice(buffer.detach())
    for name, scale in scales(module):
        yield name, *_own_slice(scale)


def _own_slice(tensor: Tensor) -> tuple[Tensor, int]:
    size = -(-tensor.numel() // world_size())
    start = min(rank() * size, tensor.numel())
    return tensor.reshape(-1)[start : start + size], start
