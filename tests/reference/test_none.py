"""Strategy `none`: training without any reference, which metrics, run folder and resume do without too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import settings, train_on


def test_trains_and_resumes_without_a_reference(inputs: Path, tmp_path: Path) -> None:
    def run(name: str, **train: Any) -> dict[str, Any]:
        return settings(
            tmp_path / name,
            inputs,
            reference_zero=None,
            loss={"type": "cpo", "beta": 0.5},
            data={"eval": str(inputs / "few.jsonl")},
            train={"max_steps": 4},
            checkpoint={"every_steps": 2, **train},
        )

    whole = train_on(1, run("whole"))
    folder = tmp_path / "whole" / "run"
    assert not (folder / "identity.json").exists()
    assert not (folder / "deepspeed_reference.json").exists()
    for row in whole:
        prefix = "eval/" if "eval/loss" in row else ""
        assert f"{prefix}reference/drift" not in row
        # TRL's CPO: rewards are beta times the policy's log-probs.
        assert row[f"{prefix}rewards/chosen"] == pytest.approx(0.5 * row[f"{prefix}logps/chosen"], rel=1e-5)

    again = train_on(1, run("whole", resume=str(folder / "checkpoints" / "step-000002")))
    names = ("loss", "eval/loss", "rewards/chosen")
    assert [[row.get(name) for name in names] for row in again] == [[row.get(name) for name in names] for row in whole]
