"""Several steps scored at once: the same losses with fewer gathers, and never a window beyond a sync."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dsdpo.config.reference import ReferenceConfig
from tests.runs import losses, settings, train_on

STEPS = 5
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
        ({**LORA, "reference": {"strategy": "adapter", **MOVES}}, [1, 3, 5]),
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


@pytest.mark.parametrize("strategy", ["precomputed", "policy_snapshot"])
def test_refused_where_it_means_nothing(strategy: str) -> None:
    moves = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0} if strategy == "policy_snapshot" else {}
    with pytest.raises(ValidationError, match=f"look_ahead_steps 4 has no effect with reference.strategy {strategy}"):
        ReferenceConfig(strategy=strategy, look_ahead_steps=4, **moves)  # type: ignore[arg-type]
