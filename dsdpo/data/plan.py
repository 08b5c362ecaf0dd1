"""Which pair is trained on in which step, on which rank, in which micro-batch: pure functions of lengths and numbers.

Optimizer step s trains on the next G pairs of the epoch's order, whatever the number of ranks; only how these G are
dealt out depends on the ranks. ZeRO-3 keeps ranks in step layer by layer, so a step costs the sum over micro-batch
index j of the costliest rank's micro-batch j: micro-batches of neighbouring cost get the same j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MicroBatches = tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> pair ids; () is a filler
RunningCost = Callable[[np.ndarray], np.ndarray]
"""(n, 3) lengths of pairs -> (n,) tokens that the first 1, 2, ..., n of them cost as one micro-batch; must not fall."""

CANDIDATES = 16  # micro-batch sizes tried per step
LOOK_AHEAD = 64  # pairs
PASS_STRETCH = 1024  # pairs of a whole pass that are balanced together: bounds the planning time


@dataclass(frozen=True)
class MicroBatchBudget:
    """What one micro-batch may hold; with `pairs` given, `tokens` is not used."""

    tokens: int | None = None  # padding included; a pair over it stands alone
    pairs: int | None = None

    def __post_init__(self) -> None:
        assert (self.tokens or 0) > 0 or (self.pairs or 0) > 0, "a budget of tokens or pairs is needed"

    @property
    def token_limit(self) -> float:
        """Tokens that may be filled up, infinite where the pairs are counted."""
        return np.inf if self.pairs or self.tokens is None else self.tokens


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of all ranks."""

    epoch: int
    pair_ids: np.ndarray  # (G,) int64 in the epoch's order; fewer at an epoch's end
    micro_batches: MicroBatches  # equally many on every rank


def padded_cost(lengths: np.ndarray) -> np.ndarray:
    """Tokens of the first n pairs padded together: 2n rows of the longest prompt + response."""
    widest = lengths[:, 0] + np.maximum(lengths[:, 1], lengths[:, 2])
    return 2 * np.arange(1, len(lengths) + 1) * np.maximum.accumulate(widest.astype(np.int64))


def steps_per_epoch(num_pairs: int, pairs_per_step: int) -> int:
    """Optimizer steps that use every pair once; the last may be smaller."""
    return -(-num_pairs // pairs_per_step)


@lru_cache(maxsize=2)
def epoch_order(num_pairs: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """(num_pairs,) int64 pair ids in the order an epoch uses them; read-only."""
    if shuffle:
        # numpy keeps bit generators' streams for good but not Generator.permutation's: a resumed run must agree.
        order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_pairs), kind="stable")
    else:
        order = np.arange(num_pairs)
    order.flags.writeable = False
    return order


def plan_step(
    lengths: np.ndarray,
    *,
    consumed_pairs: int,
    pairs_per_step: int,
    world_size: int,
    budget: MicroBatchBudget,
    seed: int,
    shuffle: bool,
    cost: RunningCost = padded_cost,
) -> StepPlan:
    """The step that follows `consumed_pairs` pairs since the start of the run; `lengths` as in `Pairs`."""
    epoch, start = divmod(consumed_pairs, len(lengths))
    pair_ids = epoch_order(len(lengths), seed=seed, epoch=epoch, shuffle=shuffle)[start : start + pairs_per_step]
    return StepPlan(epoch, pair_ids, _deal(pair_ids, lengths, world_size, budget, cost))


def plan_pass(
    lengths: np.ndarray, *, world_size: int, budget: MicroBatchBudget, cost: RunningCost = padded_cost
) -> MicroBatches:
    """Every pair once, pairs of like length together, the long ones first; equally many micro-batches on every rank."""
    by_size = np.argsort(-_size(lengths), kind="stable")
    stretches = np.array_split(by_size, max(1, len(by_size) // max(PASS_STRETCH, 8 * world_size)))
    dealt = [_deal(stretch, lengths, world_size, budget, cost) for stretch in stretches]
    return tuple(tuple(micro for part in dealt for micro in part[rank]) for rank in range(world_size))


def _deal(
    pair_ids: np.ndarray, lengths: np.ndarray, world_size: int, budget: MicroBatchBudget, cost: RunningCost
) -> MicroBatches:
    """The pairs as micro-batches within the budget, the costliest first on every rank."""
    sizes = _size(lengths[pair_ids])
    ordered = pair_ids[np.lexsort((pair_ids, sizes))]
    bins, costs = _best_bins(lengths[ordered], world_size, budget, cost)
    by_cost = sorted(range(len(bins)), key=lambda index: -costs[index])
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for start in range(0, len(by_cost), world_size):
        least_loaded = sorted(range(world_size), key=totals.__getitem__)
        group = by_cost[start : start + world_size]
        for place, rank in enumerate(least_loaded):
            ids: tuple[int, ...] = ()
            if place < len(group):
                first, end = bins[group[place]]
                ids, totals[rank] = tuple(ordered[first:end].tolist()), totals[rank] + costs[group[place]]
            ranks[rank].append(ids)
    return tuple(tuple(micro_batches) for micro_batches in ranks)


def _size(lengths: np.ndarray) -> np.ndarray:
    """(n,) tokens of each pair's longer sequence, by which pairs are put together."""
    return lengths[:, 0].astype(np.int64) + np.maximum(lengths[:, 1], lengths[:, 2])


Bins = list[tuple[int, int]]  # [first, end) of pairs sorted by size


def _best_bins(
    lengths: np.ndarray, world_size: int, budget: MicroBatchBudget, cost: RunningCost
) -> tuple[Bins, list[int]]:
    """The cheapest of several ways to cut the sorted pairs into the fewest bins that serve all ranks.

    The number of bins is the fewest that the budget allows, rounded up to a multiple of the ranks. Filling them to
    the brim leaves the last ones nearly empty; a lower limit evens them out, but too low a limit mixes long pairs
    with short ones. So a range of limits is tried and the one with the lowest step cost is kept.
    """
    fewest = _fill(lengths, budget.token_limit, budget.pairs, cost)
    wanted = min(-(-len(fewest) // world_size) * world_size, len(lengths))
    filled = [_cost(lengths, part, cost) for part in fewest]
    best: tuple[int, Bins, list[int]] | None = None
    for limit in np.geomspace(max(filled), max(1, sum(filled) // (2 * wanted)), CANDIDATES):
        bins = _fill(lengths, min(np.ceil(limit), budget.token_limit), budget.pairs, cost)
        if len(bins) > wanted:
            break
        bins = _split(bins, wanted, lengths, cost)
        costs = [_cost(lengths, part, cost) for part in bins]
        total = sum(sorted(costs, reverse=True)[::world_size])
        if best is None or total < best[0]:
            best = total, bins, costs
    assert best is not None, "the fullest bin is a limit that suffices"
    return best[1], best[2]


def _fill(lengths: np.ndarray, limit: float, most_pairs: int | None, cost: RunningCost) -> Bins:
    """Bins filled one after the other up to the limit, from the shortest pair on, so that slack stays with the longest.

    A pair that costs more than the limit is alone.
    """
    bins: Bins = []
    first = 0
    while first < len(lengths):
        ahead = most_pairs or LOOK_AHEAD
        while True:
            taken = int(np.searchsorted(cost(lengths[first : first + ahead]), limit, side="right"))
            if taken < ahead or most_pairs or first + ahead >= len(lengths):
                break
            ahead *= 4
        end = first + max(1, taken)
        bins.append((first, end))
        first = end
    return bins


def _split(bins: Bins, wanted: int, lengths: np.ndarray, cost: RunningCost) -> Bins:
    """`wanted` bins, by halving the costliest that holds more than one pair."""
    bins = list(bins)
    while len(bins) < wanted:
        divisible = [part for part in bins if part[1] - part[0] > 1]
        costliest = max(divisible, key=lambda part: _cost(lengths, part, cost))
        middle = (costliest[0] + costliest[1]) // 2
        index = bins.index(costliest)
        bins[index : index + 1] = [(costliest[0], middle), (middle, costliest[1])]
    return bins


def _cost(lengths: np.ndarray, part: tuple[int, int], cost: RunningCost) -> int:
    """Tokens of one bin."""
    return int(cost(lengths[part[0] : part[1]])[-1])


def step_cost(micro_batches: MicroBatches, lengths: np.ndarray, *, cost: RunningCost = padded_cost) -> int:
    """Tokens that a plan takes with ranks in step: the costliest rank of each micro-batch index, summed."""

    def tokens(ids: Sequence[int]) -> int:
        return int(cost(lengths[list(ids)])[-1]) if ids else 0

    return sum(max(tokens(ids) for ids in group) for group in zip(*micro_batches, strict=True))
