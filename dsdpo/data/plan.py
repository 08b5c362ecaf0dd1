"""Which pair is trained on in which step, on which rank, in which micro-batch: pure functions of lengths and numbers.

Optimizer step s trains on the next G pairs of the epoch's order, whatever the number of ranks; only how these G are
dealt out depends on the ranks. ZeRO-3 keeps ranks in step layer by layer, so a step costs the sum over micro-batch
index j of the costliest rank's micro-batch j: micro-batches of neighbouring cost get the same j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsdpo.data.binning import BINNERS, COSTS, LayoutName, MicroBatchBudget, longest_sequences

MicroBatches = tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> pair ids; () is a filler

PASS_STRETCH = 1024  # pairs of a whole pass that are balanced together: bounds the planning time


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of all ranks."""

    epoch: int
    pair_ids: np.ndarray  # (G,) int64 in the epoch's order; fewer at an epoch's end
    micro_batches: MicroBatches  # equally many on every rank


def steps_per_epoch(num_pairs: int, pairs_per_step: int) -> int:
    """Optimizer steps that use every pair once; the last may be smaller."""
    return -(-num_pairs // pairs_per_step)


def pairs_after(steps: int, *, start: int, num_pairs: int, pairs_per_step: int) -> int:
    """Pairs trained on, over all epochs, `steps` steps after `start` of them; an epoch's last step may be smaller."""
    rest = -start % num_pairs or num_pairs  # of the epoch that `start` is in
    first = steps_per_epoch(rest, pairs_per_step)
    if steps < first:
        return start + steps * pairs_per_step
    epochs, into_epoch = divmod(steps - first, steps_per_epoch(num_pairs, pairs_per_step))
    return start + rest + epochs * num_pairs + into_epoch * pairs_per_step


def remaining_steps(target: int, *, start: int, num_pairs: int, pairs_per_step: int) -> int:
    """Steps from `start` to `target` pairs over all epochs; the last may go beyond, but for an epoch's end."""
    if start >= target:
        return 0
    rest = min(-start % num_pairs or num_pairs, target - start)
    epochs, more = divmod(target - start - rest, num_pairs)
    per_epoch = steps_per_epoch(num_pairs, pairs_per_step)
    return steps_per_epoch(rest, pairs_per_step) + epochs * per_epoch + steps_per_epoch(more, pairs_per_step)


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
    layout: LayoutName = "padded",
) -> StepPlan:
    """The step that follows `consumed_pairs` pairs since the start of the run; `lengths` as in `Pairs`."""
    epoch, start = divmod(consumed_pairs, len(lengths))
    pair_ids = epoch_order(len(lengths), seed=seed, epoch=epoch, shuffle=shuffle)[start : start + pairs_per_step]
    return StepPlan(epoch, pair_ids, _deal(pair_ids, lengths, world_size, budget, layout))


def plan_pass(
    lengths: np.ndarray, *, world_size: int, budget: MicroBatchBudget, layout: LayoutName = "padded"
) -> MicroBatches:
    """Every pair once, the longest among the first; equally many micro-batches on every rank."""
    by_size = np.argsort(-longest_sequences(lengths), kind="stable")
    count = max(1, len(by_size) // max(PASS_STRETCH, 8 * world_size))
    # Padding wants pairs of like length together. Rows without padding fill up best from pairs of every length.
    stretches = [by_size[i::count] for i in range(count)] if layout == "packed" else np.array_split(by_size, count)
    dealt = [_deal(stretch, lengths, world_size, budget, layout) for stretch in stretches]
    return tuple(tuple(micro for part in dealt for micro in part[rank]) for rank in range(world_size))


def _deal(
    pair_ids: np.ndarray, lengths: np.ndarray, world_size: int, budget: MicroBatchBudget, layout: LayoutName
) -> MicroBatches:
    """The pairs as micro-batches within the budget, the costliest first on every rank."""
    ordered = pair_ids[np.lexsort((pair_ids, longest_sequences(lengths[pair_ids])))]
    bins, costs = BINNERS[layout](lengths[ordered], world_size, budget)
    by_cost = sorted(range(len(bins)), key=lambda index: -costs[index])
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for start in range(0, len(by_cost), world_size):
        least_loaded = sorted(range(world_size), key=totals.__getitem__)
        group = by_cost[start : start + world_size]
        for place, rank in enumerate(least_loaded):
            ids: tuple[int, ...] = ()
            if place < len(group):
                ids, totals[rank] = tuple(ordered[bins[group[place]]].tolist()), totals[rank] + costs[group[place]]
            ranks[rank].append(ids)
    return tuple(tuple(micro_batches) for micro_batches in ranks)


def step_cost(micro_batches: MicroBatches, lengths: np.ndarray, *, layout: LayoutName = "padded") -> int:
    """Tokens that a plan takes with ranks in step: the costliest rank of each micro-batch index, summed."""
    return sum(max(_tokens(ids, lengths, layout) for ids in group) for group in zip(*micro_batches, strict=True))


def rank_costs(micro_batches: MicroBatches, lengths: np.ndarray, *, layout: LayoutName = "padded") -> tuple[int, ...]:
    """Tokens of each rank's micro-batches together."""
    return tuple(sum(_tokens(ids, lengths, layout) for ids in rank) for rank in micro_batches)


def _tokens(ids: Sequence[int], lengths: np.ndarray, layout: LayoutName) -> int:
    return int(COSTS[layout](lengths[list(ids)])[-1]) if ids else 0
