"""A run that no longer gets better ends by itself, and exports its best weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.training.patience import check_metrics
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
    assert goes_by(run, [name for name in rows[0] if name.startswith("eval/")])
    assert len(rows) < 12, "training went on to the end"
    best = max(range(len(values)), key=values.__getitem__)
    assert len(values) - 1 - best == 2, "not two evaluations after the best one"
    exported = pair_numbers(tmp_path / "run" / "model", held_out)
    assert exported["chosen"].mean() == pytest.approx(rows[best]["eval/logps/chosen"], rel=1e-5)
    assert exported["rejected"].mean() == pytest.approx(values[best], rel=1e-5)
    assert json.loads((tmp_path / "run" / "checkpoints" / f"step-{rows[-1]['step']:06d}" / "state.json").read_text())[
        "means"
    ]["patience/since"] == pytest.approx(2.0)


def goes_by(run: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a run may keep its best checkpoint by each of these metrics."""
    pairs: Any = SimpleNamespace(origins=np.zeros((2, 2)), lengths=np.ones((2, 3), dtype=np.int64), borrowed=None)
    for name in names:
        check_metrics(RunConfig.model_validate(run | {"checkpoint": run["checkpoint"] | {"best_metric": name}}), pairs)
    return len(names) > 0


def test_parts_of_the_loss_are_metrics_to_go_by(inputs: Path, tmp_path: Path) -> None:
    run = settings(
        tmp_path, inputs, data={"eval": str(inputs / "few.jsonl")}, evaluation={"every_steps": 1},
        checkpoint={"every_steps": 1, "keep_best": 1}, loss={"type": ["sigmoid", "ipo"], "rpo_alpha": 0.5},
    )  # fmt: skip
    assert goes_by(run, ["eval/loss/nll", "eval/loss/ipo", "eval/loss"])
    with pytest.raises(ConfigError, match="eval/loss/nll is no metric"):
        goes_by(run | {"loss": {"type": "sigmoid"}}, ["eval/loss/nll"])
