"""Means over pairs, whatever ranks and micro-batches they came in."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

# By rank, by micro-batch: value and weight of each pair. Means by hand: (1 + 2 + 6) / 3 = 3.
SHARES = [
    [([1.0, 2.0], [1.0, 1.0]), ([6.0, float("nan")], [1.0, 0.0])],  # a filler's value may be anything
    [([100.0], [0.0])],  # a rank with nothing but fillers
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_mean_over_pairs_with_one_all_reduce(world_size: int) -> None:
    for means, calls, emptied in run_ranks(world_size, read_here):
        # `own` is 1 on rank 0 and 2 on rank 1.
        assert means == {"a": 3.0, "b": -3.0, "own": (world_size + 1) / 2}
        assert calls == world_size - 1
        assert emptied == {}


def read_here() -> tuple[dict[str, float], int, dict[str, float]]:
    from dsdpo.training.metrics import Meter

    meter = Meter()
    for values, weights in SHARES[dist.get_rank()]:
        value = torch.tensor(values)
        meter.add({"a": value, "b": -value}, torch.tensor(weights))
    calls = 0
    collective = dist.all_reduce

    def counting(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return collective(*arguments, **options)

    dist.all_reduce = counting
    try:
        means = meter.read({"own": dist.get_rank() + 1.0})
    finally:
        dist.all_reduce = collective
    return means, calls, meter.read()
