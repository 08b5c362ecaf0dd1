"""metrics.jsonl is the record; W&B mirrors it and never stops a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.run_folder import RunFolder
from dsdpo.training import wandb_mirror
from dsdpo.training.jsonl import read_metrics
from dsdpo.training.lost_ranks import LAST_WORDS
from dsdpo.training.mirrors import check_mirrors
from dsdpo.training.tracking import Tracker
from tests.commands.processes import finish
from tests.runs import settings, train_on
from tests.warm import warm_python


def run_in(folder: Path, wandb: dict[str, Any] | None, **tracking: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "d"},
            "deepspeed": "ds.json",
            "output_dir": str(folder),
            "tracking": {"wandb": wandb, **tracking},
        }
    )


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    train, _ = read_metrics(tmp_path)
    assert [row["step"] for row in train] == [1]
    assert math.isnan(train[0]["loss"])


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
    monkeypatch.setattr(wandb_mirror, "START_TIMEOUT_S", 2.0)
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
        settings = tracker._mirrors[0].session.settings
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
    assert settings_of("output")[1] == tmp_path.name, "the name that dsdpo init gives says nothing"
    wandb.teardown()
    assert capsys.readouterr().out.count("send this run with: wandb sync ") == 4


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


def records_of(folder: Path) -> list[Any]:
    """What the offline W&B runs of a run folder hold, in order of writing: LevelDB's log format behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        data, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # no header fits into the block
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4) and at <= len(data):  # whole, or the last part
                record = pb.Record()
                record.ParseFromString(parts)
                found.append(record)
                parts = b""
    return found


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """The rows that were logged, without W&B's own values."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def wait_for(folder: Path, what: Any) -> list[Any]:
    """The records once they are as they should be: W&B's own process writes the last of them late."""
    deadline = time.monotonic() + 60
    while True:
        records = records_of(folder)
        if what(records):
            return records
        assert time.monotonic() < deadline, records
        time.sleep(0.2)


def test_an_offline_run_holds_config_metrics_best_values_files_and_alerts(tmp_path: Path) -> None:
    files = RunFolder(tmp_path)
    files.config.write_text("model: {path: m}")
    files.deepspeed.write_text("{}")
    facts = {"resolved_deepspeed": {"zero_optimization": {"stage": 3}}, "git_commit": "abc", "parameters": 7}
    run = run_in(tmp_path, {"mode": "offline", "group": "g"}, names="trl")
    tracker = Tracker(run, files, facts=facts)
    tracker.log(1, {"loss": 0.7, "train/skipped_steps": 0})
    tracker.log(1, {"eval/loss": 0.69, "eval/rewards/accuracies": 0.5})
    tracker.alert("Step skipped", "step 2: the gradient is not finite")
    tracker.close()
    # The same run goes on, and logs a step again that was lost.
    tracker = Tracker(run, files, start_step=0)
    tracker.log(1, {"loss": 0.6})
    tracker.fail(ValueError("broken"))
    # A third time a rank is cut off, and rank 0 has the last word beside its main thread that hangs.
    Tracker(run, files)
    for word in list(LAST_WORDS):
        word("no sign of life of rank 1 for 60 s")

    records = wait_for(tmp_path, lambda records: len(history_of(records)) == 3 and
                       sum(each.WhichOneof("record_type") == "exit" for each in records) == 3)  # fmt: skip
    kinds = {kind: [getattr(each, kind) for each in records if each.WhichOneof("record_type") == kind]
             for kind in ("run", "metric", "alert", "artifact", "exit", "request")}  # fmt: skip
    first = kinds["run"][0]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["resolved_deepspeed"] == {"zero_optimization": {"stage": 3}}
    assert (config["git_commit"], config["parameters"], config["model"]["path"]) == ("abc", 7, "m")
    assert {each.run_id for each in kinds["run"]} == {first.run_id}, "a resumed run is the same run"
    assert first.run_group == "g"
    assert history_of(records) == [
        {"train/loss": 0.7, "train/skipped_steps": 0, "train/global_step": 1},
        {"eval/loss": 0.69, "eval/rewards/accuracies": 0.5, "train/global_step": 1},
        {"train/loss": 0.6, "train/global_step": 1},
    ]
    best = {each.name: (each.summary.min, each.summary.max, each.summary.last) for each in kinds["metric"] if each.name}
    assert best["train/loss"] == best["eval/loss"] == (True, False, True)
    assert best["eval/rewards/accuracies"] == best["train/rewards/margins"] == (False, True, True)
    assert [(each.title, each.text, each.level) for each in kinds["alert"]] == [
        ("Step skipped", "step 2: the gradient is not finite", "WARN"),
        ("Run failed", "ValueError: broken", "ERROR"),
        ("Rank lost", "no sign of life of rank 1 for 60 s", "ERROR"),
    ]
    saved = [each.path for artifact in kinds["artifact"] for each in artifact.manifest.contents]
    assert {"config.yaml", "deepspeed.json"} <= set(saved)
    assert [each.exit_code for each in kinds["exit"]] == [0, 1, 1]


def test_tensorboard_has_every_row_and_a_resumed_run_takes_later_ones_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_in(tmp_path, None, tensorboard=True)
    for start, losses in ((0, {1: 0.7, 2: 0.6, 3: 0.5}), (2, {3: 0.4})):
        tracker = Tracker(run, RunFolder(tmp_path), start_step=start)
        for step, loss in losses.items():
            tracker.log(step, {"loss": loss, "eval/loss": loss})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(each.step, round(each.value, 6)) for each in events.Scalars("loss")] == [(1, 0.7), (2, 0.6), (3, 0.4)]
    assert set(events.Tags()["scalars"]) == {"loss", "eval/loss"}


def test_a_mirror_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dsdpo\[tensorboard\]'"):
        check_mirrors(run_in(tmp_path, None, tensorboard=True))
    check_mirrors(run_in(tmp_path, None))


def test_a_runs_estimate_and_rows_are_in_wandb(tmp_path: Path, inputs: Path) -> None:
    wandb = {"mode": "offline"}
    spec = settings(tmp_path, inputs, train={"max_steps": 1}, tracking={"wandb": wandb, "inspected_rows": 2})
    train_on(2, spec)
    folder = Path(spec["output_dir"])
    records = wait_for(folder, lambda records: any(each.WhichOneof("record_type") == "exit" for each in records))
    [run] = [each.run for each in records if each.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    estimate = config["estimate"]
    assert estimate["ranks"] == 2
    assert estimate["fits"] is True
    assert 0 < estimate["device_gib"] < 8
    assert estimate["step_s"] > 0
    assert [row["inspected_rows/nrows"] for row in history_of(records) if "inspected_rows/nrows" in row] == [2]
    [file] = folder.glob("wandb/offline-run-*/files/media/table/inspected_rows*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["source", "row", "prompt", "chosen", "rejected", "tokens"]
    for source, number, prompt, chosen, rejected, _ in table["data"]:
        text = json.loads(Path(source).read_text().splitlines()[number])
        for name, shown in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            assert text[name][0]["content"] in shown


def test_inspected_rows_without_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no effect without"):
        run_in(tmp_path, None, inspected_rows=2)


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
    answer = finish([warm_python(), "-c", SERVICE_KILLED, str(tmp_path)], limit_s=240)
    assert answer.returncode == 0
    assert int(answer.stdout.split("killed ")[1]) > 0
    assert answer.stderr.count("W&B failed") == 1
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 20))
