"""Commands as real processes, alone or under the deepspeed launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

DSDPO = [sys.executable, "-m", "dsdpo"]


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launcher(ranks: int = 2) -> list[str]:
    """`deepspeed --num_gpus ... --module dsdpo` on a port of its own."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*command, f"--master_port={free_port()}", "--log_level=error", "--module", "dsdpo"]


# What starting a process group in the test process itself leaves behind: a command would take it for its launcher's.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_of(**changes: str) -> dict[str, str]:
    """The environment of a command that no launcher started, with `changes`."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | changes


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
    return answer
