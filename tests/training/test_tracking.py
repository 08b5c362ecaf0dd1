"""metrics.jsonl is the record; W&B mirrors it and never stops a run."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.run import RunConfig
from dsdpo.run_folder import RunFolder
from dsdpo.training import tracking
from dsdpo.training.tracking import Tracker
from tests.commands.processes import finish


def run_in(folder: Path, wandb: dict[str, Any] | None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "d"},
            "deepspeed": "ds.json",
            "output_dir": str(folder),
            "tracking": {"wandb": wandb},
        }
    )


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_begin_with_step_and_are_there_at_once(tmp_path: Path) -> None:
    tracker = Tracker(run_in(tmp_path, None), RunFolder(tmp_path))
    tracker.log(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    tracker.log(1, {"eval/loss": 0.25})
    assert tracker.last_evaluation == {"eval/loss": 0.25}
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 1]


def test_offline_wandb_writes_every_row_under_the_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    tracker = Tracker(run_in(folder, {"mode": "offline", "project": "p", "tags": ["a"]}), RunFolder(folder))
    for step, loss in ((1, 0.123456789), (2, 0.0987654321)):
        tracker.log(step, {"loss": loss})
    tracker.close()
    run_id = (folder / "wandb_run_id").read_text().strip()
    (file,) = folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    expected = (b"my-run", b"0.123456789", b"0.0987654321")
    deadline = time.monotonic() + 60  # W&B's own process writes the last of it after it has said that all is well
    while not all(part in file.read_bytes() for part in expected):
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.2)


def test_unreachable_wandb_warns_and_the_record_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "START_TIMEOUT_S", 2.0)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(run_in(tmp_path, {"mode": "online"}), RunFolder(tmp_path))
    assert "W&B could not start" in caplog.text
    assert "metrics.jsonl" in caplog.text
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_wandb_that_fails_in_the_middle_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    tracker = Tracker(run_in(tmp_path, {"mode": "offline"}), RunFolder(tmp_path))
    tracker.log(1, {"loss": 0.5})
    wandb.finish()  # what a lost service looks like from here: the next call raises
    with caplog.at_level(logging.WARNING):
        tracker.log(2, {"loss": 0.4})
        tracker.log(3, {"loss": 0.3})
        tracker.close()
    assert caplog.text.count("W&B failed") == 1
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_wandbs_own_variables_count_where_the_run_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    names = ("PROJECT", "NAME", "ENTITY", "RUN_GROUP", "TAGS")
    for name in names:
        monkeypatch.setenv(f"WANDB_{name}", f"their-{name.lower()}")

    def settings_of(folder: str, **ours: Any) -> list[Any]:
        wandb.teardown()  # which reads the environment once in a process
        (tmp_path / folder).mkdir()
        tracker = Tracker(run_in(tmp_path / folder, ours), RunFolder(tmp_path / folder))
        settings = tracker._wandb.settings
        tracker.close()
        return [
            settings.project,
            settings.run_name,
            settings.entity,
            settings.run_group,
            tuple(settings.run_tags or ()),
        ]

    assert settings_of("theirs") == ["their-project", "their-name", "their-entity", "their-run_group", ("their-tags",)]
    ours = settings_of("ours", project="p", name="n", entity="e", group="g", tags=["t"])
    assert ours == ["p", "n", "e", "g", ("t",)]
    for name in names:
        monkeypatch.delenv(f"WANDB_{name}")
    assert settings_of("neither")[:2] == ["dsdpo", "neither"]
    wandb.teardown()
    assert capsys.readouterr().out.count("send this run with: wandb sync ") == 3


def test_without_a_login_nobody_is_asked_and_files_are_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # which is not there
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(run_in(tmp_path, {}), RunFolder(tmp_path))
        tracker.log(1, {"loss": 0.5})
        tracker.close()
    assert caplog.text.count("not logged in") == 1
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert f"wandb sync {folder}" in capsys.readouterr().out


SERVICE_KILLED = """
import logging, os, signal, sys
from pathlib import Path
from dsdpo.run_folder import RunFolder
from dsdpo.training.tracking import Tracker
from tests.kill_test import family
from tests.training.test_tracking import run_in

logging.basicConfig(level=logging.WARNING)
os.environ.pop("WANDB_SERVICE", None)  # that of the tests before this one, if any
folder = Path(sys.argv[1])
tracker = Tracker(run_in(folder, {"mode": "offline"}), RunFolder(folder))
tracker.log(1, {"loss": 0.5})
service = family(os.getpid())[1:]
for pid in service:
    os.kill(pid, signal.SIGKILL)
for step in range(2, 20):
    tracker.log(step, {"loss": 0.5})
tracker.close()
print("killed", len(service))
"""


def test_training_continues_when_the_wandb_process_dies(tmp_path: Path) -> None:
    answer = finish([sys.executable, "-c", SERVICE_KILLED, str(tmp_path)], limit_s=240)
    assert answer.returncode == 0
    assert int(answer.stdout.split("killed ")[1]) > 0
    assert answer.stderr.count("W&B failed") == 1
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 20))
