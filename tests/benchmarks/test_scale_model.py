"""The scale model's arithmetic by hand, and its reading of a measured case, without ranks."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks.harness.inputs import same_lengths
from benchmarks.harness.scale import Profile, by_bandwidth, imbalance_of, link_bytes, scaled
from benchmarks.harness.throttled import Place, Turn, raw
from benchmarks.scale_model import MANY, ONE, case_rows, kinds_of, points_of
from dsdpo.data.binning import MicroBatchBudget
from dsdpo.estimate.hardware import GPUS
from dsdpo.estimate.seconds import Machine
from dsdpo.estimate.traffic import REFERENCE_WEIGHTS, Exchange

WEIGHTS, GRADIENTS = Exchange("weights", 8000, 4), Exchange("gradients", 4000, 2, laps=2)
REFERENCE = Exchange(REFERENCE_WEIGHTS, 4000, 2)
ALL = (WEIGHTS, GRADIENTS, REFERENCE)


def test_a_step_by_hand() -> None:
    """On 2 ranks and links of 1,000 bytes/s: 4 s of weights, 4 s of gradients, 2 s of the reference's weights."""
    profile = Profile(policy=6.0, reference=3.0, rest=1.0)
    after = scaled(profile, ALL, by_bandwidth(1000, 2), overlap=False)
    assert (after.arithmetic, after.collectives, after.total) == (9.0, 10.0, 20.0)
    assert after.efficiency == 0.5
    beside = scaled(profile, ALL, by_bandwidth(1000, 2), overlap=True)
    assert beside.total == 8.0 + 3.0 + 1.0  # the policy waits for its links, the reference's are done before it is
    late = scaled(profile, ALL, by_bandwidth(1000, 2), imbalance=1.5, overlap=True)
    assert late.total == 9.0 + 4.5 + 1.0


def test_bytes_of_links() -> None:
    """8 ranks on 2 nodes; what stays on a node crosses no network."""
    machine = Machine(GPUS["h100"], 8, 4)
    kept = replace(WEIGHTS, group=4)
    assert link_bytes((kept, GRADIENTS), machine) == (6000 + 7000, 7000)
    assert link_bytes((WEIGHTS,), replace(machine, per_node=8)) == (7000, 0)
    assert link_bytes((WEIGHTS,), replace(machine, per_node=1)) == (0, 7000)


def test_imbalance_by_hand() -> None:
    budget = MicroBatchBudget(tokens=1000)
    even = imbalance_of(same_lengths(16, 6, 4), ranks=4, pairs_per_step=8, budget=budget)
    assert even == 1.0
    # A pair a rank: 6 + 3 + 3 tokens are computed of three of them and 60 + 3 + 3 of the fourth.
    lengths = np.array([[6, 4, 4]] * 3 + [[60, 4, 4]])
    assert imbalance_of(lengths, ranks=4, pairs_per_step=4, budget=budget) == pytest.approx(66 / ((3 * 12 + 66) / 4))


def test_a_measured_case_is_held_against_its_prediction() -> None:
    """Cables of 1,000 and 2,000 bytes/s; 10,000 bytes a step are predicted over each, and 10,100 counted."""
    assert list(kinds_of(ALL)) == [("gather", 2000), ("all-reduce", 2000)]
    turns = {
        ONE: [Turn(1000, 2.0, 0.0), Turn(2000, 2.0, 0.0)],
        MANY: [Turn(1000, 15.0, 10_100.0), Turn(2000, 7.0, 10_100.0)],
        "gather 2000": [Turn(1000, 1.5, 1000.0), Turn(2000, 0.5, 1000.0)],
        "all-reduce 2000": [Turn(1000, 2.0, 2000.0), Turn(2000, 1.0, 2000.0)],
    }
    found = {"exchanges": [asdict(one) for one in ALL], "turns": raw(turns)}
    slow, fast = points_of(found, ranks=2)
    assert (slow.rate, slow.sent, slow.seconds) == (1000, 1.01, [15.0])
    assert slow.by_rate == [2.0 + 10.0]
    assert slow.by_probe == [2.0 + 6 * 1.5 + 2 * 2.0]
    assert (fast.by_rate, fast.by_probe) == ([2.0 + 5.0], [2.0 + 6 * 0.5 + 2 * 1.0])
    first, _ = case_rows("ZeRO-3", Place(2, 1), found)
    assert first[2:] == ("0.990", "15.00", "12.00", "0.80x", "15.00", "1.00x")
