"""Stopping early: whatever asks for it, all ranks stop after the same step, saved, and the run can go on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import metrics, settings

STOPPED = 75


def exit_code(run: dict[str, Any], touch: Path | None = None, signalled: int | None = None) -> int:
    """Train in this rank; on the way rank 0 may get a stop file, and one rank a signal."""
    from dsdpo.commands.train import train
    from dsdpo.config.run import RunConfig
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run))
    if touch is not None and torch.distributed.get_rank() == 0:
        touch.parent.mkdir(parents=True, exist_ok=True)  # rank 1 may have made it
        touch.touch()
    if signalled == torch.distributed.get_rank():
        original = torch.Tensor.backward

        def backward(*arguments: Any, **options: Any) -> Any:  # in the middle of the second step
            backward.calls += 1  # type: ignore[attr-defined]
            if backward.calls == 4:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(*arguments, **options)

        backward.calls = 0  # type: ignore[attr-defined]
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        try:
            return train(plan)
        finally:
            torch.Tensor.backward = original  # type: ignore[method-assign]
    return train(plan)


def stopped_record(run: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(run["output_dir"]) / "stopped.json").read_text())


def test_a_signal_to_one_rank_stops_both(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs)
    assert run_ranks(2, exit_code, run, None, 1) == [STOPPED, STOPPED]
    record = stopped_record(run)
    assert record["reason"] == "SIGUSR1"
    assert 1 <= record["step"] < 4
    checkpoints = [path.name for path in (Path(run["output_dir"]) / "checkpoints").iterdir()]
    assert checkpoints == [f"step-{record['step']:06d}"]
    assert not (Path(run["output_dir"]) / "model").exists()
    assert run_ranks(2, exit_code, {**run, "checkpoint": {"every_steps": 0, "resume": "auto"}}) == [0, 0]
    assert [row["step"] for row in metrics(Path(run["output_dir"]))] == [1, 2, 3, 4]


def test_a_stop_file_a_deadline_and_a_time_limit_stop_too(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, train={"max_steps": 6})
    resumed = {**run, "checkpoint": {"every_steps": 0, "resume": "auto"}}
    file = Path(run["output_dir"]) / "STOP"
    assert run_ranks(2, exit_code, resumed, file) == [STOPPED, STOPPED]
    assert stopped_record(run) == {"reason": f"the file {file}", "step": 1}
    assert not file.exists(), "the next start would stop at once"
    late = {**run, "checkpoint": {"every_steps": 0, "resume": "auto", "deadline": 0.001}}
    assert run_ranks(2, exit_code, late) == [STOPPED, STOPPED]
    assert stopped_record(run) == {"reason": "checkpoint.deadline", "step": 2}
    short = {**run, "checkpoint": {"every_steps": 0, "resume": "auto", "time_limit": 250}}  # a save may take 2 x 120 s
    assert run_ranks(2, exit_code, short) == [STOPPED, STOPPED]
    record = stopped_record(run)
    assert (record["reason"], record["step"]) == ("checkpoint.time_limit", 4)  # the step after the first look
    assert 0 < record["save_s"] < 100
    short["checkpoint"]["time_limit"] = 31 + 2 * 100 + 100  # enough, now that a save has been measured
    assert run_ranks(2, exit_code, short) == [0, 0]


def test_changes_of_the_system_clock_affect_neither_deadline_nor_metrics(inputs: Path, tmp_path: Path) -> None:
    """The time of day is set a day back and a year ahead, again and again, during a run with an hour to go."""
    run = settings(tmp_path, inputs, checkpoint={"every_steps": 2, "deadline": 3600})
    assert run_ranks(2, exit_code_while_the_clock_jumps, run) == [0, 0]
    rows = metrics(Path(run["output_dir"]))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    timed = [value for row in rows for name, value in row.items() if name.startswith(("time/", "perf/"))]
    assert len(timed) >= 12
    assert all(0 <= value < 1e6 for value in timed)
    assert 0 < rows[-1]["time/step_s"] < 600


def exit_code_while_the_clock_jumps(run: dict[str, Any]) -> int:
    """Train on this rank with a `time.time` that is set whenever it is read."""
    original, jumps = time.time, itertools.cycle((-86_400.0, 31_536_000.0, 0.0))
    time.time = lambda: original() + next(jumps)
    try:
        return exit_code(run)
    finally:
        time.time = original


@pytest.mark.parametrize("during", ["precompute", "loading", "first evaluation"])
def test_a_signal_before_the_first_step_loses_nothing(during: str, inputs: Path, tmp_path: Path) -> None:
    """One rank is signalled: both stop at once with the code that asks for a restart, and what was scored is kept."""
    precomputed = {"strategy": "precomputed", "store": str(tmp_path / "store"), "score_tokens": 64, "audit_rows": 0}
    run = settings(
        tmp_path,
        inputs,
        reference=precomputed if during == "precompute" else {},
        data={"eval": str(inputs / ("few.jsonl" if during == "loading" else "test.jsonl"))},
        batch={"pairs_per_micro_batch": 1},
    )
    codes, scored = zip(*run_ranks(2, signalled_early, run, during), strict=True)
    assert codes == (STOPPED, STOPPED)
    assert stopped_record(run) == {"reason": "SIGTERM", "step": 0}
    assert not (Path(run["output_dir"]) / "metrics.jsonl").exists() or not metrics(Path(run["output_dir"]))
    if during == "precompute":
        assert 0 < sum(scored) < 100, "it stopped at once"
        parts = list((tmp_path / "store").glob("*/part-*.parquet"))
        assert sum(pq.read_metadata(part).num_rows for part in parts) == sum(scored)
    again = {**run, "checkpoint": {"every_steps": 0, "resume": "auto"}, "train": {"max_steps": 1}}
    again["data"] = {**run["data"], "eval": str(inputs / "few.jsonl")}  # nothing of it is known yet
    if during != "precompute":
        assert run_ranks(2, exit_code, again) == [0, 0]
        assert not (Path(run["output_dir"]) / "stopped.json").exists(), "the run went on"


def signalled_early(run: dict[str, Any], during: str) -> tuple[int, int]:
    """Train in this rank; rank 1 is sent SIGTERM on the way. The exit code, and pairs scored for the store."""
    from dsdpo.engine import build
    from dsdpo.reference.store import ShardWriter
    from dsdpo.training import evaluate

    scored = 0

    def strike() -> None:
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def appended(self: Any, keys: Any, rows: Any) -> None:
        nonlocal scored
        scored += len(keys)
        strike()
        append(self, keys, rows)

    def loaded(*arguments: Any, **options: Any) -> Any:
        strike()
        return load(*arguments, **options)

    def scored_pairs(*arguments: Any, **options: Any) -> Any:
        strike()
        return score(*arguments, **options)

    append, load, score = ShardWriter.append, build.load_lm, evaluate.policy_scores
    ShardWriter.append = appended  # type: ignore[method-assign]
    if during == "loading":
        build.load_lm = loaded
    if during == "first evaluation":
        evaluate.policy_scores = scored_pairs
    try:
        return exit_code(run), scored
    finally:
        ShardWriter.append, build.load_lm, evaluate.policy_scores = append, load, score  # type: ignore[method-assign]
