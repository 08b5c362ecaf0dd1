"""Runs whose processes are killed, frozen or signalled, as real processes: under the launcher and without."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands.processes import ENVIRONMENT, SLURM, start_ranks
from tests.kill_test import Kill, Report, Started, count_rows, run_and_kill
from tests.runs import settings
from tests.training.test_tracking import wait_for
from tests.warm import warm_python

STOPPED, LOST = 75, 1
HOST = socket.gethostname()
SECRET = "5ec2e7" * 8
SECRETS = {"WANDB_API_KEY": SECRET[:40], "HF_TOKEN": f"hf_{SECRET}"}


def test_killed_runs_resume_to_the_same_weights_and_metrics(tmp_path: Path) -> None:
    """A kill while saving beside training, a rank's death, a SIGTERM to one; `python -m tests.kill_test` does more."""
    kills = [
        Kill("save", "all", rows=3, python=warm_python()),
        Kill("train", "rank 1", rows=2),
        Kill("train", "rank 1", number=signal.SIGTERM, rows=2, python=warm_python()),
    ]
    report = run_and_kill(tmp_path, kills, steps=18)
    assert [kill["hit"] for kill in report.kills] == [report.kills[0]["hit"], 1, 1]
    assert report.kills[0]["saving"], "the first kill came too late"
    assert report.exit_codes[0] == -signal.SIGKILL
    assert report.exit_codes[-1] == 0
    assert all(code != 0 for code in report.exit_codes[:-1])
    assert f"dsdpo (rank 0 on {HOST}): rank 1 (" in report.outputs[1]
    assert "died or lost the connection" in report.outputs[1]
    assert f"stopped after step {report.resumed_from[3]} by SIGTERM; everything is saved" in report.outputs[2]
    assert report.kills[2]["rows_then"] <= report.resumed_from[3] <= report.kills[2]["rows_then"] + 2
    assert report.damaged == []
    assert report.same_weights
    assert report.same_pairs
    assert report.same_metrics


def start(run: dict[str, Any], folder: Path, *, names: tuple[str, ...] = ENVIRONMENT) -> list[Started]:
    """Two ranks with nothing above them, each told who it is by the environment, as srun or a script does it."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    ranks = start_ranks(["train", str(path), "--resume", "auto"], logs, names=names, **SECRETS)
    return [Started(process, log, path) for process, log in zip(ranks, logs, strict=True)]


@pytest.fixture
def run(inputs: Path, tmp_path: Path) -> dict[str, Any]:
    """Longer than any test waits."""
    return settings(
        tmp_path,
        inputs,
        train={"max_steps": 10_000},
        checkpoint={"every_steps": 1000},
        distributed={"timeout_minutes": 5, "lost_after": 10},
        tracking={"wandb": {"mode": "offline"}},
    )


def has_alert(records: list[Any]) -> bool:
    """Whether one of an offline W&B run's records is an alert."""
    return any(each.WhichOneof("record_type") == "alert" for each in records)


def test_ranks_without_a_launcher(run: dict[str, Any], tmp_path: Path) -> None:
    """All are signalled at once as by srun; then one is frozen; then the first one is killed."""
    folder, report = Path(run["output_dir"]), Report()

    ranks = start(run, tmp_path, names=SLURM)
    ranks[0].wait_until(lambda: count_rows(folder) >= 2)
    before = count_rows(folder)
    for rank in ranks:
        rank.process.send_signal(signal.SIGUSR1)
    assert [rank.finish(report) for rank in ranks] == [STOPPED, STOPPED]
    record = json.loads((folder / "stopped.json").read_text())
    assert record["reason"] == "SIGUSR1"
    assert before <= record["step"] <= before + 2, "the step under way, and one if it ended just then"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{record['step']:06d}"]

    ranks = start(run, tmp_path)
    ranks[0].wait_until(lambda: "resumed from" in ranks[0].log.read_text() and count_rows(folder) > record["step"])
    ranks[1].process.send_signal(signal.SIGSTOP)  # to a collective that only waits, like NCCL's, this is what death is
    assert ranks[0].finish(report) == LOST
    ranks[1].process.kill()
    ranks[1].process.wait()
    assert f"dsdpo (rank 0 on {HOST}): rank 1 (" in report.outputs[-1]
    assert "gave no sign of life for 10 s. Go on with --resume auto" in report.outputs[-1]
    assert f"resumed from {folder}/checkpoints/step-{record['step']:06d}" in report.outputs[-1]
    [alert] = [each.alert for each in wait_for(folder, has_alert) if each.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.level) == ("Rank lost", "ERROR")
    assert "rank 1 (" in alert.text
    assert "gave no sign of life for 10 s" in alert.text

    ranks = start(run, tmp_path)
    ranks[0].wait_until(lambda: "resumed from" in ranks[0].log.read_text() and count_rows(folder) > record["step"])
    ranks[0].process.kill()
    assert ranks[1].finish(report) == LOST
    ranks[0].process.wait()
    assert f"dsdpo (rank 1 on {HOST}):" in report.outputs[-1]
    assert "rank 0 is gone" in report.outputs[-1]

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert [path for path in files if b"5ec2e7" in path.read_bytes()] == [], "the account's keys were written down"
