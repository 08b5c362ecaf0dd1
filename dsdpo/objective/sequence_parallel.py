"""Attention and sums over a packed row whose tokens are split over the ranks of a sequence group.

Between two attentions a token's computation needs no other token, so each rank does its part of the row. For attention
the ranks exchange: each gives its tokens of all heads and gets all tokens of its share of the heads, computes attention
over the whole row, and the exchange goes back. Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv 2309.14509).
Shapes: T tokens of the row, n of them on each rank (the last ones padding), H query heads, G key and value heads, S
ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dsdpo.console import counted
from dsdpo.data.batch import Packed, PreferenceBatch
from dsdpo.errors import ConfigError
from dsdpo.sequence_group import SequenceGroup


class _Exchange(torch.autograd.Function):
    """(S, n, F) -> (S, n, F): block i goes to rank i of the group, and comes from it. Collective, backwards too."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return _exchanged(sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _exchanged(grad, ctx.group), None


def _exchanged(sent: Tensor, group: SequenceGroup) -> Tensor:
    # Not empty_like(sent), which would keep the strides of a gradient that is a view.
    received = torch.empty(sent.shape, dtype=sent.dtype, device=sent.device)
    dist.all_to_all_single(received, sent.contiguous(), group=group.handle)
    return received


class _Sum(torch.autograd.Function):
    """The sum over a group's ranks, each of which goes on to the same loss: so its gradient is each part's own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group.handle)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def sum_over_group(values: Tensor, group: SequenceGroup) -> Tensor:
    """The sum of the group's values, on each of its ranks. Collective in the group."""
    total: Tensor = _Sum.apply(values, group)
    return total


def refuse_heads(heads: int, size: int, what: str) -> None:
    """Raise `ConfigError` unless `size` ranks can share the query heads of `what`; it names the sizes that can."""
    if heads % size:
        able = ", ".join(str(number) for number in range(2, heads + 1) if heads % number == 0) or "none"
        raise ConfigError(
            f"distributed.sequence_parallel: {size} ranks cannot share the {counted(heads, 'attention head')} of "
            f"{what} evenly; sizes that can: {able}"
        )


def whole_row(
    query: Tensor, key: Tensor, value: Tensor, length: int, group: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's heads of query, key and value over the whole row of `length` tokens. Collective in the group.

    Of this rank's tokens, query is (1, H, n, D) and the others (1, G, n, D); of its heads, the answers are
    (1, H/S, T, D) and (1, G'/S, T, D). Where S does not divide G, each key and value head is repeated as often as the
    least common multiple G' asks, so that each rank has those that its query heads look at, in their order.
    """
    size, kv_heads = group.size, key.shape[1]
    refuse_heads(query.shape[1], size, "a layer")
    copies = math.lcm(kv_heads, size) // kv_heads
    if query.shape[1] % (copies * kv_heads):
        raise ConfigError(
            f"distributed.sequence_parallel: {size} ranks cannot share {kv_heads} key and value heads under "
            f"{query.shape[1]} query heads: set it to a divisor of {kv_heads}, or leave it out"
        )
    if copies > 1:
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
    parts = [_by_rank(tensor, size) for tensor in (query, key, value)]
    widths = [part.shape[-1] for part in parts]
    received: Tensor = _Exchange.apply(torch.cat(parts, dim=-1), group)
    whole = received.flatten(0, 1)[:length].split(widths, dim=-1)
    heads = [tensor.shape[1] // size for tensor in (query, key, value)]
    q, k, v = (part.unflatten(-1, (count, -1)).transpose(0, 1)[None] for part, count in zip(whole, heads, strict=True))
    return q, k, v


def _by_rank(tensor: Tensor, size: int) -> Tensor:
    """(1, H, n, D) -> (S, n, H/S * D): what each rank of the group gets of it."""
    return tensor[0].unflatten(0, (size, -1)).transpose(1, 2).flatten(2)


def own_tokens(result: Tensor, group: SequenceGroup) -> Tensor:
    """Attention (1, n, H, D) of this rank's tokens, from that (1, T, H/S, D) of its heads. Collective in the group."""
    _, length, heads, width = result.shape
    _, part = group.part(length)
    whole = pad(result[0], (0, 0, 0, 0, 0, part * group.size - length))
    received: Tensor = _Exchange.apply(whole.unflatten(0, (group.size, part)).flatten(2), group)
    return received.unflatten(-1, (heads, width)).transpose(0, 1).flatten(1, 2)[None]


def own_heads(per_head: Tensor | None, group: SequenceGroup) -> Tensor | None:
    """This rank's share of a tensor (H,) with a number for each query head."""
    return None if per_head is None else per_head.chunk(group.size)[group.place]


def own_part(batch: PreferenceBatch, group: SequenceGroup) -> tuple[PreferenceBatch, Tensor]:
    """The batch with this rank's positions (1, n) of its row and the targets that are predicted there; and which of
    the batch's targets those are, (m,) int64. Waits for no device.

    Position ids stay those of the whole row; positions beyond its end get token and position 0, and predict nothing.
    """
    assert isinstance(batch.attention, Packed)
    start, size = group.part(batch.num_tokens)
    mine = _own_targets(batch.attention, start, start + size, batch.input_ids.device)
    beyond = group.size * size - batch.num_tokens
    input_ids, position_ids = (
        pad(row, (0, beyond))[:, start : start + size] for row in (batch.input_ids, batch.position_ids)
    )
    counted = None if batch.counted is None else pad(batch.counted, (0, beyond))[:, start : start + size]
    score_at, targets, response = (
        listed.index_select(0, mine) for listed in (batch.score_at - start, batch.targets, batch.response)
    )
    part = replace(
        batch,
        input_ids=input_ids,
        position_ids=position_ids,
        score_at=score_at,
        targets=targets,
        response=response,
        counted=counted,
    )
    return part, mine


@lru_cache(maxsize=4)
def _own_targets(packed: Packed, start: int, end: int, device: torch.device) -> Tensor:
    mine = np.flatnonzero((packed.scored >= start) & (packed.scored < end))
    return torch.from_numpy(mine).to(device, non_blocking=True)
