"""What a step sends and how long it takes, by hand for a few parameters on a few ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsdpo.estimate.hardware import GPUS
from dsdpo.estimate.memory import policy_memory, reference_memory
from dsdpo.estimate.seconds import HOP, NETWORK_HOP, START, Machine
from dsdpo.estimate.traffic import REFERENCE_WEIGHTS, Exchange, scoring_exchanges, training_exchanges
from dsdpo.estimate.weights import Part, Weights

# 400 + 600 elements of two bytes, of which adapters would train the first 400 alone.
ALL = Weights((Part((400,), (True,), 0), Part((600,), (True,), 1)), 2)
SOME = Weights((Part((400,), (True,), 0), Part((600,), (False,), 1)), 2)
FEW = {
    f"stage3_{name}": 0
    for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
}


def sent(zero: dict[str, Any], weights: Weights = ALL, *, micro_batches: float = 3, gloo: bool = False) -> Any:
    """The exchanges of a step's training by name: bytes, collectives, laps, group."""
    config = {"zero_optimization": {"reduce_bucket_size": 500, **zero}}
    memory = policy_memory(config, weights, ranks=4, checkpointing=False)
    return {
        one.name: (one.size, one.count, one.laps, one.group)
        for one in training_exchanges(config, weights, memory, micro_batches, gloo=gloo)
    }


def test_each_stage_by_hand() -> None:
    """1,000 elements are 2,000 bytes in two buckets; stage 3 gathers them forward and backward."""
    assert sent({"stage": 1}) == {"gradients": (2000, 2, 2, None), "updated weights": (2000, 1, 1, None)}
    assert sent({"stage": 2}) == {"gradients": (6000, 6, 2, None), "updated weights": (2000, 1, 1, None)}
    assert sent({"stage": 3, **FEW}) == {"weights": (12000, 12, 1, None), "gradients": (6000, 6, 1, None)}
    assert sent({"stage": 3, **FEW}, gloo=True)["gradients"] == (6000, 6, 2, None)
    assert sent({"stage": 3, **FEW}, SOME)["gradients"] == (2400, 3, 1, None)


def test_quantized_and_kept_on_a_node() -> None:
    quantized = {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    found = sent({"stage": 3, **FEW, **quantized})
    assert (found["weights"][0], found["gradients"][0]) == (6000, 1500)
    # Of 12,000 bytes, those that the update changed are gathered over all ranks once; adapters change fewer.
    hpz = {"stage": 3, **FEW, "zero_hpz_partition_size": 2}
    assert sent(hpz)["weights after an update"] == (2000, 2, 1, None)
    assert sent(hpz)["weights"] == (10000, 10, 1, 2)
    assert sent(hpz, SOME)["weights after an update"][0] == 800


def test_the_reference_is_gathered_once_a_pass() -> None:
    config = {"zero_optimization": {"stage": 3, **FEW}}
    memory = reference_memory(config, ALL, ranks=4)
    assert scoring_exchanges(config, ALL, memory, 2) == (Exchange(REFERENCE_WEIGHTS, 4000, 4),)
    whole = {"zero_optimization": {"stage": 0}}
    assert scoring_exchanges(whole, ALL, reference_memory(whole, ALL, ranks=4), 2) == ()


def test_a_link_carries_all_but_one_part_each_way() -> None:
    assert Exchange("gather", 4000, 1).sent(4) == 3000
    assert Exchange("all-reduce", 4000, 1, laps=2).sent(4) == 6000
    assert Exchange("in pairs", 4000, 1, group=2).sent(64) == 2000
    assert Exchange("alone", 4000, 1).sent(1) == 0


def test_seconds_within_and_between_nodes() -> None:
    """GPUs that receive 100 bytes a second from each other and share a network of 10 each."""
    gpu = replace(GPUS["h100"], link=100.0, network=10.0)
    gather = Exchange("gather", 8000, 2)
    assert Machine(gpu, 8, 8).seconds(gather) == pytest.approx(7000 / 100 + 2 * (START + 7 * HOP))
    # Over two nodes of four: four networks of 10 together; of 7 hops one is between nodes.
    between = START + 6 * HOP + NETWORK_HOP
    assert Machine(gpu, 8, 4).seconds(gather) == pytest.approx(7000 / 40 + 2 * between)
    assert Machine(gpu, 8, 1).seconds(gather) == pytest.approx(7000 / 10 + 2 * (START + 7 * NETWORK_HOP))
    assert Machine(gpu, 8, 4).seconds(replace(gather, group=4)) == pytest.approx(6000 / 100 + 2 * (START + 3 * HOP))
    # Twelve networks of 10 are faster than what brings it to them.
    assert Machine(gpu, 24, 12).seconds(Exchange("large", 24000, 0)) == pytest.approx(23000 / 100)
    assert Machine(gpu, 1, 1).seconds(gather) == 0
