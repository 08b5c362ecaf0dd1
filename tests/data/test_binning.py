"""Micro-batches of the packed layout: whole, within the budget, full and even."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from dsdpo.data.binning import MicroBatchBudget, packed_cost
from dsdpo.data.plan import MicroBatches, plan_pass, plan_step, step_cost

# Medians of prompt and response as measured in public preference data, lognormal around them.
DATA = {"chat": (409, 290, 290), "summaries": (380, 34, 34), "help": (127, 59, 59)}


def random_lengths(rng: np.random.Generator, pairs: int, medians: tuple[int, int, int] = (80, 120, 120)) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(medians), 0.6, (pairs, 3)), 1, 1500).astype(np.int32)


def packed_step(lengths: np.ndarray, ranks: int, **budget: int) -> MicroBatches:
    return plan_step(
        lengths,
        consumed_pairs=0,
        pairs_per_step=len(lengths),
        world_size=ranks,
        budget=MicroBatchBudget(**budget),
        seed=0,
        shuffle=True,
        layout="packed",
    ).micro_batches


def tokens(lengths: np.ndarray, ids: tuple[int, ...]) -> int:
    return int(packed_cost(lengths[list(ids)])[-1]) if ids else 0


def test_packed_cost_by_hand() -> None:
    # Prompt and both responses, the last token of each response left out: 4, 8, 6.
    assert packed_cost(np.array([[2, 3, 1], [4, 1, 5], [3, 3, 2]])).tolist() == [4, 12, 18]


def test_every_pair_once_within_the_budget_and_equally_many_for_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = random_lengths(rng, int(rng.integers(1, 150)))
        ranks, limit = int(rng.integers(1, 9)), int(rng.integers(100, 20_000))
        budgets: list[dict[str, int]] = [{"tokens": limit}, {"tokens": limit, "pairs": int(rng.integers(1, 9))}]
        for budget in budgets:
            plan = packed_step(lengths, ranks, **budget)
            micro_batches = list(chain.from_iterable(plan))
            assert sorted(chain.from_iterable(micro_batches)) == list(range(len(lengths)))
            assert len({len(rank) for rank in plan}) == 1
            assert sum(map(bool, micro_batches)) == min(len(micro_batches), len(lengths)), "a filler in place of a pair"
            for ids in micro_batches:
                if "pairs" in budget:
                    assert len(ids) <= budget["pairs"]
                else:
                    assert len(ids) <= 1 or tokens(lengths, ids) <= limit


def test_few_more_micro_batches_than_the_tokens_need() -> None:
    """One rank, so that no rounding to ranks is in it: at least 92 % of every budget is filled."""
    rng = np.random.default_rng(1)
    used = room = 0
    for _ in range(50):
        lengths = random_lengths(rng, 128)
        plan = packed_step(lengths, 1, tokens=4096)
        used += tokens(lengths, tuple(range(128)))
        room += 4096 * len(plan[0])
    assert used > 0.92 * room


def test_best_fit_serves_where_the_emptiest_row_overflows() -> None:
    """3 + 3 and 2 + 2 + 2 tokens fill two rows of 6; each to the emptiest row would need a third."""
    lengths = np.array([[3, 1, 1], [3, 1, 1], [2, 1, 1], [2, 1, 1], [2, 1, 1]])
    assert sorted(tuple(sorted(ids)) for ids in packed_step(lengths, 1, tokens=6)[0]) == [(0, 1), (2, 3, 4)]


@pytest.mark.parametrize("data", DATA)
def test_ranks_wait_for_each_other_less_than_two_percent(data: str) -> None:
    rng = np.random.default_rng(2)
    lengths = random_lengths(rng, 1024, DATA[data])
    plan = packed_step(lengths, 8, tokens=16384)
    assert step_cost(plan, lengths, layout="packed") < 1.02 * tokens(lengths, tuple(range(1024))) / 8


@pytest.mark.parametrize("data", DATA)
def test_a_third_of_the_tokens_of_padded_micro_batches_of_four(data: str) -> None:
    """64 ranks, 1,024 pairs a step: what ranks compute or wait for, against random padded micro-batches of 4 pairs."""
    rng = np.random.default_rng(3)
    lengths = random_lengths(rng, 1024, DATA[data])
    shuffled = rng.permutation(1024).reshape(64, 4, 4)
    plain = tuple(tuple(tuple(ids.tolist()) for ids in rank) for rank in shuffled)
    packed = packed_step(lengths, 64, tokens=8192)
    assert step_cost(plain, lengths, layout="padded") > 3 * step_cost(packed, lengths, layout="packed")


def test_a_whole_pass_mixes_lengths_and_starts_with_the_longest_pair() -> None:
    lengths = random_lengths(np.random.default_rng(4), 5000)
    plan = plan_pass(lengths, world_size=4, budget=MicroBatchBudget(tokens=8192), layout="packed")
    assert sorted(chain.from_iterable(chain.from_iterable(plan))) == list(range(5000))
    assert len({len(rank) for rank in plan}) == 1
    longest = int((lengths[:, 0] + lengths[:, 1:].max(1)).argmax())
    assert any(longest in ids for rank in plan for ids in rank[: len(rank) // 4])
    assert step_cost(plan, lengths, layout="packed") < 1.02 * tokens(lengths, tuple(range(5000))) / 4
