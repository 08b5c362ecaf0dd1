"""One run at a time in a run folder: a file that says who uses it, and signs of life while it does.

The holder adds to a counter in the file every few seconds. Whether another machine's holder is alive is seen by whether
the counter moves, so no two clocks are compared; a process of this machine is looked for by its number.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsdpo.errors import ConfigError
from dsdpo.run_folder import RunFolder

BEAT_S = 5.0
SILENT_S = 20.0  # without a sign of life, after which a holder elsewhere is taken for dead


class RunLock:
    """This process's hold on a run folder, from `acquire` to `release`."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.lock
        self._folder = folder.path
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run-lock")
        self.taken_by: str | None = None  # who has taken the folder from this process, which must not write any more

    def acquire(self) -> None:
        """Take the folder, which is made if need be.

        Raises `ConfigError` where a live process has it, or nothing can be written there.
        """
        try:
            self._take()
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self._folder} on {socket.gethostname()} cannot be written ({error.strerror}): make "
                "room, or choose another folder"
            ) from error
        self._thread.start()

    def _take(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        while not self._create():
            found = _read(self._path)
            if found is None:
                continue  # it has just been released
            if _is_alive(self._path, found):
                raise ConfigError(
                    f"output_dir: {self._folder} is in use by {_describe(found)}: wait until that run is done, or "
                    "choose another folder"
                )
            self._take_over(found)

    def release(self) -> None:
        """Give the folder back, unless another process has taken it; an empty one goes."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if (_read(self._path) or {}).get("token") == self._token:
                self._path.unlink()
            self._folder.rmdir()  # only if nothing was written into it

    def _content(self, beats: int) -> bytes:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), **_identity_of(os.getpid())}
        return (json.dumps({**holder, "token": self._token, "beats": beats}) + "\n").encode()

    def _create(self) -> bool:
        """Make the file if it is not there, in one step; whether this process made it."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._content(0))
        return True

    def _take_over(self, dead: dict[str, Any]) -> None:
        """Take a dead holder's file away; only one of several that try moves it."""
        aside = self._path.with_name(f"{self._path.name}.{self._token}")
        with suppress(FileNotFoundError):
            self._path.rename(aside)
            moved = _read(aside)
            if moved is not None and moved.get("token") != dead.get("token"):
                with suppress(FileExistsError):
                    os.link(aside, self._path)  # another was first, and this was its new one
            aside.unlink()

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_S):
            beats += 1
            with suppress(OSError):
                found = _read(self._path)
                if found is not None and found.get("token") != self._token:
                    self.taken_by = _describe(found)
                    return
                self._path.write_bytes(self._content(beats))


def holder(folder: RunFolder) -> str | None:
    """A live process of this machine that uses the folder, in words; None if there is none, or none that is known."""
    found = _read(folder.lock)
    return _describe(found) if found is not None and _is_here(found) and _runs(found) else None


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; None if there is none. A file that is not a lock's is one of an unknown holder."""
    for _ in range(10):
        try:
            content = json.loads(path.read_text())
            return content if isinstance(content, dict) else {}
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # being written
            time.sleep(0.05)
    return {}


def _is_alive(path: Path, found: dict[str, Any]) -> bool:
    """Whether the holder still runs; of one elsewhere it takes `SILENT_S` to know that it does not."""
    if _is_here(found):
        return _runs(found)
    until = time.monotonic() + SILENT_S
    while time.monotonic() < until:
        time.sleep(0.5)
        now = _read(path)
        if now is None:
            return False
        if now != found:
            return True
    return False


def _is_here(found: dict[str, Any]) -> bool:
    here = _identity_of(os.getpid())
    same_machine = (found.get("host"), found.get("pid_namespace")) == (socket.gethostname(), here["pid_namespace"])
    return same_machine and isinstance(found.get("pid"), int)


def _runs(found: dict[str, Any]) -> bool:
    """Whether a process of this machine is still the one that took the lock: numbers are given out again."""
    return _identity_of(found["pid"])["started"] == found.get("started") is not None


def _identity_of(pid: int) -> dict[str, str | None]:
    """What tells a process from a later one of the same number, and this machine's processes from a container's."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        started = None if fields[0] == "Z" else fields[19]  # a zombie is dead, though its parent has not looked yet
    except (OSError, IndexError):
        started = _started_without_proc(pid)
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = None
    return {"started": started, "pid_namespace": namespace}


def _started_without_proc(pid: int) -> str | None:
    """On a system without /proc: "alive" for any process of that number."""
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _describe(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', 'an unknown machine')}"
