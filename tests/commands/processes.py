"""Commands as real processes, alone or under the deepspeed launcher, and in a process that is there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

DSDPO = [sys.executable, "-m", "dsdpo"]


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launcher(ranks: int = 2, *, python: str = sys.executable) -> list[str]:
    """`deepspeed --num_gpus ... --module dsdpo` on a port of its own."""
    command = [python, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*command, f"--master_port={free_port()}", "--log_level=error", "--module", "dsdpo"]


# How launchers tell a process its rank, their number, and both on its node.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
# What starting a process group in the test process itself leaves behind: a command would take it for its launcher's.
LAUNCHERS = (*ENVIRONMENT, "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_of(**changes: str) -> dict[str, str]:
    """The environment of a command that no launcher started, with `changes`."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | changes


# What is said where something takes long, as loading libraries does on a busy machine.
WAITED = re.compile(r"^.* \.\.\. \d+ s\n", re.MULTILINE)


def finish(
    command: list[str], *, limit_s: float, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a command said, if it ends before `limit_s`."""
    started = time.monotonic()
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        cwd=cwd,
        env=environment_of(**environment),
    )
    print(f"{time.monotonic() - started:.1f} s, exit code {answer.returncode}")  # for pytest -s and failures
    print(answer.stdout, answer.stderr, sep="\n")
    answer.stderr = WAITED.sub("", answer.stderr)
    return answer


class Forked:
    """`dsdpo ARGUMENTS` as a process of its own that starts at once: forked from where all libraries are imported.

    For runs of several ranks that are killed or signalled, where the imports of each start would be most of the time.
    What it prints goes to `log`; its environment is that of `environment_of`. The methods are those of
    `subprocess.Popen`.
    """

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        from tests.ranks import context

        told = environment_of(**environment)
        log.write_bytes(b"")  # before anyone reads what an earlier process printed there
        self._process = context.Process(target=_become_command, args=(arguments, str(log), told), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if it was killed; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired("dsdpo", timeout or 0.0)
        self._process.join()
        return int(self._process.exitcode)

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become_command(arguments: list[str], log: str, environment: dict[str, str]) -> NoReturn:
    from dsdpo.__main__ import entry

    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["dsdpo", *arguments]
    entry()


def start_ranks(
    arguments: list[str], logs: list[Path], *, names: Sequence[str] = ENVIRONMENT, **environment: str
) -> list[Forked]:
    """A command on as many ranks as there are logs, with nothing above them: the environment tells each who it is.

    `names` are the variables for rank, number of ranks, rank on this node and number of ranks on this node.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank, log in enumerate(logs):
        who = dict(zip(names, map(str, (rank, len(logs), rank, len(logs))), strict=True))
        started.append(Forked(arguments, log, **meeting, **who, **environment))
    return started


def main_here(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `dsdpo` in this process, C++ libraries' words included."""
    from dsdpo.__main__ import main

    with captured(1) as output, captured(2) as errors:
        code = main(argv)
    return code, output.read_text(), errors.read_text()


@contextmanager
def captured(descriptor: int) -> Iterator[Path]:
    """A file that holds all that is written to a file descriptor meanwhile."""
    path = Path(tempfile.mkdtemp()) / "text"
    stream = {1: sys.stdout, 2: sys.stderr}[descriptor]
    stream.flush()
    kept = os.dup(descriptor)
    with path.open("wb") as file:
        os.dup2(file.fileno(), descriptor)
    try:
        yield path
    finally:
        stream.flush()
        os.dup2(kept, descriptor)
        os.close(kept)
