"""A run that no longer gets better ends by itself, and exports its best weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import demo_inputs, settings, train_on
from tests.training.test_evaluate import pair_numbers


def test_the_best_weights_are_exported_when_patience_runs_out(tmp_path: Path) -> None:
    inputs = demo_inputs(tmp_path / "inputs")
    held_out = inputs / "few.jsonl"
    run = settings(
        tmp_path,
        inputs,
        data={"eval": str(held_out)},
        # Of the rejected responses' metric, which training lowers from the first step on, the start is the best.
        evaluation={"every_steps": 1, "at_start": False, "patience": 2, "metric": "eval/logps/rejected"},
        checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": 1, "best_metric": "eval/logps/rejected"},
        export={"which": "best"},
        train={"max_steps": 12},
        optimizer={"learning_rate": 1e-2},
    )
    rows = [row for row in train_on(1, run) if "eval/loss" in row]
    values = [row["eval/logps/rejected"] for row in rows]
    assert len(rows) < 12, "training went on to the end"
    best = max(range(len(values)), key=values.__getitem__)
    assert len(values) - 1 - best == 2, "not two evaluations after the best one"
    exported = pair_numbers(tmp_path / "run" / "model", held_out)
    assert exported["chosen"].mean() == pytest.approx(rows[best]["eval/logps/chosen"], rel=1e-5)
    assert exported["rejected"].mean() == pytest.approx(values[best], rel=1e-5)
    assert json.loads((tmp_path / "run" / "checkpoints" / f"step-{rows[-1]['step']:06d}" / "state.json").read_text())[
        "means"
    ]["patience/since"] == pytest.approx(2.0)
