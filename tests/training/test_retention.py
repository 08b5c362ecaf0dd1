"""Which checkpoints stay: the newest and the best, of the whole ones, and never none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsdpo.config.load import load_run, run_parser
from dsdpo.errors import ConfigError
from dsdpo.training.checkpoint import Retention, superseded, whole_checkpoints
from tests.runs import settings, train_on

SCORES = {1: 0.60, 2: 0.50, 3: 0.55, 4: None, 5: 0.50, 6: float("nan"), 7: 0.65}  # eval/loss by step


def checkpoints(folder: Path) -> list[Path]:
    """Folders with a state as checkpoints have it."""
    for step, loss in SCORES.items():
        path = folder / f"step-{step:06d}"
        path.mkdir(parents=True)
        evaluation = {} if loss is None else {"eval/loss": loss, "eval/rewards/accuracies": loss}
        (path / "state.json").write_text(json.dumps({"step": step, "evaluation": evaluation}))
    return whole_checkpoints(folder)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Retention(last=2), [6, 7]),
        (Retention(last=1, best=1), [5, 7]),  # of equals the newer
        (Retention(last=1, best=2), [2, 5, 7]),
        (Retention(last=1, best=3), [2, 3, 5, 7]),
        (Retention(last=3, best=1), [5, 6, 7]),
        (Retention(last=1, best=2, metric="eval/rewards/accuracies"), [1, 7]),  # the newest is among the best
        (Retention(last=1, best=99), [1, 2, 3, 5, 7]),  # neither 4, never evaluated, nor 6, whose loss is no number
        (Retention(last=99), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_newest_and_best_are_kept(keep: Retention, kept: list[int], tmp_path: Path) -> None:
    whole = checkpoints(tmp_path)
    gone = superseded(whole, keep)
    assert [int(path.name[5:]) for path in whole if path not in gone] == kept


def test_a_run_keeps_its_best_checkpoints(inputs: Path, tmp_path: Path) -> None:
    """With a learning rate that soon ruins the policy, the best ones are not the newest."""
    run = settings(
        tmp_path,
        inputs,
        policy_zero="zero2",
        reference_zero="zero0",
        data={"eval": str(inputs / "test.jsonl")},
        batch={"pairs_per_micro_batch": None, "tokens_per_micro_batch": 2000},
        optimizer={"learning_rate": 0.1},
        train={"max_steps": 6},
        evaluation={"every_steps": 1},
        checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": 2},
    )
    losses = {row["step"]: row["eval/loss"] for row in train_on(2, run) if "eval/loss" in row and row["step"]}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    found = whole_checkpoints(Path(run["output_dir"]) / "checkpoints")
    assert [int(path.name[5:]) for path in found] == sorted({*best, 6})
    assert 6 not in best


def test_keep_best_without_an_evaluation_at_each_checkpoint_is_refused(tmp_path: Path) -> None:
    run = settings(tmp_path, tmp_path, checkpoint={"every_steps": 10, "keep_best": 1}, evaluation={"every_steps": 4})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run))
    with pytest.raises(
        ConfigError, match=r"checkpoint.every_steps \(10\) to a multiple of evaluation.every_steps \(4\)"
    ):
        load_run([str(path)], run_parser("train", ""))
