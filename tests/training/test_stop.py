"""Stopping early: whatever asks for it, all ranks stop after the same step, saved, and the run can go on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

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
        touch.parent.mkdir(parents=True)
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


def test_a_stop_file_and_a_deadline_stop_too(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs)
    resumed = {**run, "checkpoint": {"every_steps": 0, "resume": "auto"}}
    file = Path(run["output_dir"]) / "STOP"
    assert run_ranks(2, exit_code, resumed, file) == [STOPPED, STOPPED]
    assert stopped_record(run) == {"reason": f"the file {file}", "step": 1}
    assert not file.exists(), "the next start would stop at once"
    late = {**run, "checkpoint": {"every_steps": 0, "resume": "auto", "deadline": 0}}
    assert run_ranks(2, exit_code, late) == [STOPPED, STOPPED]
    assert stopped_record(run) == {"reason": "checkpoint.deadline", "step": 2}


def test_a_clock_that_jumps_stops_nothing_and_bends_no_metric(inputs: Path, tmp_path: Path) -> None:
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
