"""Stopping early: whatever asks for it, all ranks stop after the same step, saved, and the run can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.commands.processes import free_port
from tests.ranks import run_ranks
from tests.runs import demo_inputs, metrics, settings

STOPPED = 75


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_inputs(tmp_path_factory.mktemp("inputs"))


def exit_code(run: dict[str, Any], touch: Path | None = None, signalled: int | None = None) -> int:
    """Train in this rank; on the way rank 0 may get a stop file, and one rank a signal."""
    from dsdpo.commands.prepare import prepare
    from dsdpo.commands.train import train
    from dsdpo.config.run import RunConfig

    plan = prepare(RunConfig.model_validate(run))
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


def test_sigterm_to_a_rank_under_the_launcher_loses_nothing(inputs: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank of a real launch, then --resume auto: every step once, weights as if nothing had happened."""
    whole = settings(tmp_path / "whole", inputs, train={"max_steps": 30})
    stopped = settings(tmp_path / "stopped", inputs, train={"max_steps": 30})
    assert launch(whole, tmp_path).wait(240) == 0
    folder = Path(stopped["output_dir"])
    launcher = launch(stopped, tmp_path)
    wait_for_rows(folder / "metrics.jsonl", 3)
    os.kill(rank_pid(launcher.pid, 1), signal.SIGTERM)
    assert launcher.wait(240) != 0
    assert stopped_record(stopped)["reason"] == "SIGTERM"
    assert launch(stopped, tmp_path, "--resume", "auto").wait(240) == 0
    assert [row["step"] for row in metrics(folder)] == list(range(1, 31))
    expected = load_file(Path(whole["output_dir"]) / "model" / "model.safetensors")
    found = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def launch(run: dict[str, Any], folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The run on two ranks under the deepspeed launcher."""
    path = folder / f"{Path(run['output_dir']).parent.name}.yaml"
    path.write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", f"--master_port={free_port()}"]
    return subprocess.Popen([*command, "--module", "dsdpo", "train", str(path), *arguments], stdout=subprocess.DEVNULL)


def wait_for_rows(path: Path, count: int) -> None:
    until = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < until, "the run did not get going"
        time.sleep(0.05)


def rank_pid(ancestor: int, local_rank: int) -> int:
    """The process of a local rank below a launcher."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            if f"--local_rank={local_rank}" in words and "dsdpo" in words and descends(int(process.name), ancestor):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {local_rank} below {ancestor}")


def descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False
