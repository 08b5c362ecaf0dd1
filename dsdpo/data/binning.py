"""How pairs are cut into micro-batches: what they cost in each layout, and which go together.

Every rank needs equally many micro-batches, so their number is the fewest that the budget allows, rounded up to a
multiple of the ranks; then they are made as even as can be. Pairs are never split.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

LayoutName = Literal["packed", "padded"]
Bins = list[list[int]]  # each micro-batch's pairs, as places in the pairs' lengths

HALVINGS = 12  # of the range in which the limit of a micro-batch is looked for
LOOK_AHEAD = 64  # pairs


@dataclass(frozen=True)
class MicroBatchBudget:
    """What one micro-batch may hold; with `pairs` given, `tokens` is not used."""

    tokens: int | None = None  # as the layout counts them, padding included; a pair over it stands alone
    pairs: int | None = None

    def __post_init__(self) -> None:
        assert (self.tokens or 0) > 0 or (self.pairs or 0) > 0, "a budget of tokens or pairs is needed"

    @property
    def token_limit(self) -> float:
        """Tokens that may be filled up, infinite where the pairs are counted."""
        return np.inf if self.pairs or self.tokens is None else self.tokens


def padded_cost(lengths: np.ndarray) -> np.ndarray:
    """(n,) tokens of the first 1, 2, ..., n groups padded together: each a row per response, as long as the longest."""
    widest = longest_sequences(lengths)
    return (lengths.shape[1] - 1) * np.arange(1, len(lengths) + 1) * np.maximum.accumulate(widest)


def longest_sequences(lengths: np.ndarray) -> np.ndarray:
    """(n,) tokens of each group's longest prompt + response."""
    return lengths[:, 0].astype(np.int64) + lengths[:, 1:].max(axis=1)


def sequence_tokens(lengths: np.ndarray) -> np.ndarray:
    """(n,) tokens of each group's prompt + response, summed over its responses."""
    responses = (lengths[:, 1:] > 0).sum(axis=1)
    return lengths.sum(axis=1, dtype=np.int64) + (responses - 1) * lengths[:, 0].astype(np.int64)


def packed_cost(lengths: np.ndarray) -> np.ndarray:
    """(n,) tokens of the first 1, 2, ..., n groups in one row.

    Equal beginnings of the responses would save a little more; not to count them keeps the budget an upper bound.
    """
    return np.cumsum(_packed_sizes(lengths))


def _packed_sizes(lengths: np.ndarray) -> np.ndarray:
    """(n,) tokens of each group: the prompt once, all responses without their last tokens."""
    return lengths.sum(axis=1, dtype=np.int64) - (lengths[:, 1:] > 0).sum(axis=1)


def even_bins(lengths: np.ndarray, world_size: int, budget: MicroBatchBudget) -> tuple[Bins, list[int]]:
    """Micro-batches for the packed layout, and their tokens: as even as can be, else as full as can be.

    Source: Graham 1969 (longest first, each to the emptiest) and best fit decreasing, where the former overflows.
    """
    sizes = _packed_sizes(lengths)
    limit = max(budget.token_limit, 1)
    most_pairs = budget.pairs or len(sizes)
    order = np.argsort(-sizes, kind="stable").tolist()
    least = max(-(-len(sizes) // most_pairs), int(np.ceil(np.minimum(sizes, limit).sum() / limit)))
    wanted = -(-least // world_size) * world_size
    while True:
        count = min(wanted, len(sizes))
        bins = _emptiest_first(sizes.tolist(), order, count, limit, most_pairs)
        bins = bins or _fullest_first(sizes.tolist(), order, count, limit)
        if bins is not None:
            return bins, [int(sizes[part].sum()) for part in bins]
        wanted += world_size


def _emptiest_first(sizes: list[int], order: list[int], count: int, limit: float, most_pairs: int) -> Bins | None:
    """The pairs dealt out to `count` bins, each to the emptiest; None if one fits nowhere."""
    bins: Bins = [[] for _ in range(count)]
    emptiest = [(0, index) for index in range(count)]
    for pair in order:
        load, index = emptiest[0]
        if load and load + sizes[pair] > limit:
            return None
        bins[index].append(pair)
        if len(bins[index]) < most_pairs:
            heapq.heapreplace(emptiest, (load + sizes[pair], index))
        else:
            heapq.heappop(emptiest)
    return bins


def _fullest_first(sizes: list[int], order: list[int], count: int, limit: float) -> Bins | None:
    """The pairs dealt out to `count` bins, each to the fullest that takes it; None if one fits nowhere."""
    bins: Bins = []
    loads: list[int] = []
    for pair in order:
        fitting = [index for index, load in enumerate(loads) if load + sizes[pair] <= limit]
        if fitting:
            index = max(fitting, key=loads.__getitem__)
            bins[index].append(pair)
            loads[index] += sizes[pair]
        elif len(bins) < count:
            bins.append([pair])
            loads.append(sizes[pair])
        else:
            return None
    while len(bins) < count:  # a rank without a pair would compute a filler
        donor = max((part for part in bins if len(part) > 1), key=len)
        bins.append([donor.pop()])
    return bins


Ranges = list[tuple[int, int]]  # [first, end) of pairs sorted by size


def alike_bins(lengths: np.ndarray, world_size: int, budget: MicroBatchBudget) -> tuple[Bins, list[int]]:
    """Micro-batches for the padded layout, and their tokens, from pairs sorted by size: neighbours go together.

    The cheaper of two ways to cut: filled up to the budget, which may leave the last ones nearly empty, or up to the
    lowest limit that needs no more of them, which may pad short pairs to long ones. That limit is found by bisection.
    """
    full = _fill(lengths, budget.token_limit, budget.pairs)
    wanted = min(-(-len(full) // world_size) * world_size, len(lengths))
    even, low, high = full, 0.0, float(max(_cost(lengths, part) for part in full))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tighter = _fill(lengths, min(middle, budget.token_limit), budget.pairs)
        even, low, high = (tighter, low, middle) if len(tighter) <= wanted else (even, middle, high)
    found = []
    for ranges in (full, even):
        split = _split(ranges, wanted, lengths)
        costs = [_cost(lengths, part) for part in split]
        found.append((sum(sorted(costs, reverse=True)[::world_size]), split, costs))
    _, best, costs = min(found, key=lambda one: one[0])
    return [list(range(first, end)) for first, end in best], costs


def _fill(lengths: np.ndarray, limit: float, most_pairs: int | None) -> Ranges:
    """Ranges filled up to the limit one after the other; a pair that costs more is alone.

    The shortest pairs come first, so that slack stays with the longest.
    """
    ranges: Ranges = []
    first = 0
    while first < len(lengths):
        ahead = most_pairs or LOOK_AHEAD
        while True:
            taken = int(np.searchsorted(padded_cost(lengths[first : first + ahead]), limit, side="right"))
            if taken < ahead or most_pairs or first + ahead >= len(lengths):
                break
            ahead *= 4
        end = first + max(1, taken)
        ranges.append((first, end))
        first = end
    return ranges


def _split(ranges: Ranges, wanted: int, lengths: np.ndarray) -> Ranges:
    """`wanted` ranges, by halving the costliest that holds more than one pair."""
    ranges = list(ranges)
    while len(ranges) < wanted:
        divisible = [part for part in ranges if part[1] - part[0] > 1]
        costliest = max(divisible, key=lambda part: _cost(lengths, part))
        middle = (costliest[0] + costliest[1]) // 2
        index = ranges.index(costliest)
        ranges[index : index + 1] = [(costliest[0], middle), (middle, costliest[1])]
    return ranges


def _cost(lengths: np.ndarray, part: tuple[int, int]) -> int:
    """Tokens of one range."""
    return int(padded_cost(lengths[part[0] : part[1]])[-1])


COSTS: dict[LayoutName, Callable[[np.ndarray], np.ndarray]] = {"packed": packed_cost, "padded": padded_cost}
"""(n, 3) lengths of pairs -> (n,) tokens that the first 1, 2, ..., n of them cost as one micro-batch; never falls."""

BINNERS: dict[LayoutName, Callable[[np.ndarray, int, MicroBatchBudget], tuple[Bins, list[int]]]] = {
    "packed": even_bins,
    "padded": alike_bins,
}
"""(n, 3) lengths by size, ranks, budget -> micro-batches within the budget and the tokens of each."""
