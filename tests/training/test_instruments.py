"""What one looks at when a run is slow or does not learn; and an evaluation at a sync says something."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from dsdpo.training.perf import PHASES
from tests.runs import metrics, settings, train_on


def test_profile_has_the_phases_and_overfit_first_step_repeats_the_first_step(inputs: Path, tmp_path: Path) -> None:
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 6, "ref_model_mixup_alpha": 1.0}
    run = settings(
        tmp_path,
        inputs,
        data={"eval": str(inputs / "few.jsonl")},
        train={"max_steps": 12, "overfit_first_step": True},
        optimizer={"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
        tracking={"profile_steps": [2, 3]},
        reference=moves,
        evaluation={"every_steps": 6},
    )
    train_on(2, run)
    folder = Path(run["output_dir"])
    rows = metrics(folder)
    steps = [json.loads(line)["pair_ids"] for line in (folder / "pairs.jsonl").open()]
    assert len(steps) == 12
    assert all(ids == steps[0] for ids in steps)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[5] < 0.75 * losses[0], "eight pairs were not learned by heart"
    assert losses[6] == pytest.approx(math.log(2), abs=1e-5), "the reference is the policy after the sync"
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    assert all(abs(row["eval/rewards/margins"]) > 1e-3 for row in evaluations[1:]), "policy and reference were one"
    for rank in (0, 1):
        with gzip.open(folder / "profile" / f"rank-{rank}.trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        counts = {phase: sum(event.get("name") == phase for event in events) for phase in PHASES}
        assert counts == dict.fromkeys(PHASES, 2), "two steps were traced"
