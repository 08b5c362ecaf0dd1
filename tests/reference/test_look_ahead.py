"""Several steps scored at once: the same losses with fewer gathers, and never a window beyond a sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dsdpo.config.reference import ReferenceConfig
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.steps import StepBatches
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference
from tests.runs import losses, settings, train_on
from tests.tiny import random_batch

STEPS = 4
LORA = {"model": {"lora": {"r": 4}}, "reference_zero": None}
MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}


def rows_of(folder: Path, inputs: Path, case: dict[str, Any], look_ahead_steps: int) -> list[dict[str, float]]:
    reference = {**case.get("reference", {}), "look_ahead_steps": look_ahead_steps}
    steps = {"train": {"max_steps": STEPS}, "evaluation": {"every_steps": 2, "at_start": False}}
    data = {"eval": str(inputs / "few.jsonl")}
    return train_on(2, settings(folder, inputs, **{**steps, "data": data, **case, "reference": reference}))


@pytest.mark.parametrize(
    ("case", "scored_at"),
    [
        ({}, [1, 4]),
        ({**LORA, "reference": {"strategy": "adapter", **MOVES}}, [1, 3]),
    ],
    ids=["separate", "moving adapter"],
)
def test_same_losses_with_a_gather_for_several_steps(
    case: dict[str, Any], scored_at: list[int], inputs: Path, tmp_path: Path
) -> None:
    """Three steps at a time. Evaluations in between do not disturb."""
    one = rows_of(tmp_path / "one", inputs, case, 1)
    three = rows_of(tmp_path / "three", inputs, case, 3)
    assert losses(three) == losses(one)
    assert [row["eval/loss"] for row in three if "eval/loss" in row] == [
        r["eval/loss"] for r in one if "eval/loss" in r
    ]
    each_step = gathers_of(one)
    assert all(each_step.values())
    assert gathers_of(three) == {step: count if step in scored_at else 0 for step, count in each_step.items()}


def gathers_of(rows: list[dict[str, float]]) -> dict[float, float]:
    """By step, the parameters that were made whole for the reference."""
    return {row["step"]: row["comm/reference_gathers"] for row in rows if "loss" in row}


class Counting(Reference):
    """Answers nothing but how many batches it was asked for at a time."""

    def __init__(self, look_ahead_steps: int, sync_every: int | None) -> None:
        self.look_ahead_steps, self.sync_every = look_ahead_steps, sync_every
        self.passes: list[int] = []

    def score(self, window: Sequence[PreferenceBatch]) -> list[PairLogps]:
        self.passes.append(len(window))
        return [PairLogps.zeros(batch.num_pairs) for batch in window]


def steps(count: int) -> list[StepBatches]:
    """Steps of 2 batches, of 1 and 3 pairs."""
    source = StepBatches((), 4, 0, 0.0, np.zeros(4), np.zeros((4, 3)), (0,), 0, 0)
    return [replace(source, batches=(random_batch(1), random_batch(3))) for _ in range(count)]


@pytest.mark.parametrize(
    ("look_ahead", "sync_every", "after", "passes"),
    [
        (1, None, 0, [2, 2, 2, 2, 2, 2]),
        (4, None, 0, [8, 4]),
        (9, None, 0, [12]),
        (3, 4, 0, [6, 2, 4]),
        (3, 4, 3, [2, 6, 2, 2]),
    ],
)
def test_steps_are_scored_together_up_to_a_sync(
    look_ahead: int, sync_every: int | None, after: int, passes: list[int]
) -> None:
    reference, given = Counting(look_ahead, sync_every), steps(6)
    # Other objects that hold the same batches: nothing is recognised by identity.
    handed_on = (replace(step, batches=(*step.batches,)) for step in given)
    found = list(reference.along(handed_on, after=after))
    assert reference.passes == passes
    for (step, anchor), original in zip(found, given, strict=True):
        assert step.batches == original.batches
        assert [len(logps) for logps in anchor] == [1, 3]


@pytest.mark.parametrize("strategy", ["precomputed", "policy_snapshot"])
def test_look_ahead_without_effect_is_refused(strategy: str) -> None:
    moves = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0} if strategy == "policy_snapshot" else {}
    with pytest.raises(ValidationError, match=f"look_ahead_steps 4 has no effect with reference.strategy {strategy}"):
        ReferenceConfig(strategy=strategy, look_ahead_steps=4, **moves)  # type: ignore[arg-type]
