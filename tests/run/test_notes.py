"""Lines of the plan on what cannot have been meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines import planned
from tests.ranks import run_ranks
from tests.runs import settings


def notes_here(runs: list[dict[str, Any]]) -> list[list[str]]:
    from dsdpo.run.notes import run_notes

    return [list(run_notes(planned(run))) for run in runs]


def test_suspicious_settings_are_noted_in_the_plan(inputs: Path, tmp_path: Path) -> None:
    rows = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    few, shared = tmp_path / "few.jsonl", tmp_path / "shared.jsonl"
    few.write_text("".join(rows[:10]))
    shared.write_text("".join([*rows[5:8], *(inputs / "few.jsonl").read_text().splitlines(keepends=True)]))
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    odd = settings(
        tmp_path / "odd",
        inputs,
        data={"train": str(few), "eval": str(shared)},
        batch={"pairs_per_step": 64},
        optimizer={"learning_rate": 0.0, "warmup_steps": 100},
        train={"max_steps": 4, "overfit_first_step": True},
        reference=moves,
        evaluation={"every_steps": 2},
    )
    twice = settings(tmp_path / "twice", inputs, data={"train": [str(few), str(few)], "eval": str(few)})
    fine = settings(tmp_path / "fine", inputs, data={"eval": str(inputs / "few.jsonl")}, reference=moves)
    [(of_odd, of_twice, of_fine)] = run_ranks(1, notes_here, [odd, twice, fine])
    for part in (
        "batch.pairs_per_step 64 is more than the 10 training pairs",
        "the warm-up takes 100 of 4 steps",
        "optimizer.learning_rate is 0",
        "3 of the 9 held-out pairs are training pairs too",
        "every 2) are scored before it does",
        "train.overfit_first_step",
    ):
        assert sum(part in line for line in of_odd) == 1, part
    assert sum("data.train names" in line and "twice" in line for line in of_twice) == 1
    assert sum("data.eval names" in line for line in of_twice) == 1
    assert [line for line in of_fine if "scored before" not in line] == []


def test_a_checkout_that_is_not_installed_has_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a machine runs the source tree by its path, or does without W&B."""
    import importlib.metadata

    import torch

    from dsdpo.run import output_folder

    found = importlib.metadata.distribution

    def without(name: str) -> importlib.metadata.Distribution:
        if name in ("dsdpo", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    versions = output_folder.environment()["versions"]
    assert versions["dsdpo"] == versions["wandb"] == "not installed"
    assert versions["torch"] == torch.__version__
    assert versions["deepspeed"][0].isdigit()
