"""One run at a time in a folder: who has it, who may take it over, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsdpo import run_lock
from dsdpo.errors import ConfigError
from dsdpo.run_folder import RunFolder
from dsdpo.run_lock import RunLock, holder

HOLD = """
import sys, time
from dsdpo.run_folder import RunFolder
from dsdpo.run_lock import RunLock
RunLock(RunFolder(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_folder_of_a_live_run_is_refused(other: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert str(other.pid) in str(holder(folder))
    with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .*choose another folder"):
        RunLock(folder).acquire()


def test_the_folder_of_a_dead_run_is_taken_over(other: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    other.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # a zombie until its parent looks
    assert holder(folder) is None
    lock = RunLock(folder)
    started = time.monotonic()
    lock.acquire()
    assert time.monotonic() - started < run_lock.SILENT_S / 2
    assert json.loads(folder.lock.read_text())["pid"] == os.getpid()
    lock.release()
    assert not folder.path.exists(), "nothing was written into it"


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    first = RunLock(folder)
    first.acquire()
    content = json.loads(folder.lock.read_text())
    first.release()
    folder.path.mkdir()
    folder.lock.write_text(json.dumps({**content, "started": "1"}))
    second = RunLock(folder)
    second.acquire()
    second.release()


def test_a_run_on_another_machine_is_known_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its clock says; and a holder that was taken for dead learns that it has lost the folder."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    monkeypatch.setattr(run_lock, "SILENT_S", 2.0)
    folder = RunFolder(tmp_path / "run")
    first = RunLock(folder)
    first.acquire()
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "elsewhere")
    time.sleep(0.5)
    with pytest.raises(ConfigError, match="in use by process"):
        RunLock(folder).acquire()
    first._ended.set()  # as if its machine had gone down
    first._thread.join()
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "here")
    second = RunLock(folder)
    second.acquire()
    first._ended.clear()
    first._beat()  # and had come back
    assert first.taken_by is not None
    assert "on here" in first.taken_by
    first.release()
    assert folder.lock.exists(), "another's lock is not released"
    second.release()


def test_an_unreadable_lock_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", 0.5)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.lock.write_text("cut o")
    lock = RunLock(folder)
    lock.acquire()
    lock.release()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .*cannot be written"):
        RunLock(RunFolder(tmp_path / "file" / "run")).acquire()
