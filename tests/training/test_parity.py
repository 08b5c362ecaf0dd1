"""TRL's trajectories, step by step: same model, same rows, same optimizer (see ../shared/parity/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import settings, train_on

RELATIVE = ("loss", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


@pytest.mark.parametrize(("loss", "world_size"), [("sigmoid", 1), ("sigmoid", 2), ("ipo", 1), ("ipo", 2), ("hinge", 2)])
def test_trl_trajectory(loss: str, world_size: int, shared: Path, tmp_path: Path) -> None:
    expected = json.loads((shared / "parity" / f"{loss}.json").read_text())["steps"]
    run = settings(
        tmp_path,
        shared,
        model={"path": str(shared / "models" / "tiny-sft")},
        data={
            "train": str(shared / "data" / "train.jsonl"),
            "max_length": 512,
            "shuffle": False,
            "cache_dir": str(tmp_path / "cache"),
        },
        loss={"type": loss, "beta": 0.1},
        optimizer={"learning_rate": 1e-4, "warmup_steps": 4},
        batch={"pairs_per_step": 8, "pairs_per_micro_batch": 4},
        train={"max_steps": 24},
    )
    rows = train_on(world_size, run)
    assert len(rows) == len(expected) == 24
    for row, trl in zip(rows, expected, strict=True):
        for name in RELATIVE:
            assert row[name] == pytest.approx(trl[name], rel=1e-4), (trl["step"], name)
        for name in REWARDS:
            assert row[name] == pytest.approx(trl[name], abs=2e-4), (trl["step"], name)
        assert row["rewards/accuracies"] == pytest.approx(trl["rewards/accuracies"]), trl["step"]
