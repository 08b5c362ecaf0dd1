"""Trials under the deepspeed launcher, each in processes of its own, and how they ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dsdpo.atomic import write_text
from dsdpo.config.load import dump_yaml
from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.run.trial import PEAKS, Figures, figures_of, trial_settings
from dsdpo.stop_signals import noted_signal

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
BAD_INPUT = 2  # the exit code of a run that refuses its input
KILLED = (137, 247, -9)  # exit codes of a launcher, one of whose ranks got SIGKILL
LOG, SETTINGS = "log.txt", "run.yaml"
ENDING_S = 20.0  # from SIGTERM to SIGKILL
NO_MEMORY = re.compile(
    r"(out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory|MemoryError\b|bad_alloc)[^\n]*"
)
ON_DEVICE = re.compile(r"CUDA out of memory|HIP out of memory|torch\.OutOfMemoryError|CUDA error: out of memory")
RANK_ENDED = re.compile(r"^\w*(Error|Exception): .+|^dsdpo( \([^)]*\))?: .+", re.MULTILINE)
FITS, NO_DEVICE_MEMORY, NO_HOST_MEMORY = "yes", "no, device memory", "no, host memory"
REFUSED, FAILED, TOO_LONG = "refused", "failed", "took too long"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with figures, or in one of the ways above."""

    ended: str
    figures: Figures | None = None
    reason: str = ""  # where there are no figures

    @property
    def fits(self) -> bool:
        """Whether all its steps were taken."""
        return self.figures is not None


def try_run(
    run: RunConfig,
    folder: Path,
    *,
    run_file: Path,
    policy: str,
    reference: str | None,
    ranks: int,
    steps: int,
    limit_s: float,
) -> Outcome:
    """Run a trial in `folder`, which is made, to its end. Raises `KeyboardInterrupt` if this process is to stop."""
    folder.mkdir(parents=True)
    try:
        settings = trial_settings(run, folder, policy=policy, reference=reference, steps=steps, run_file=run_file)
    except ConfigError as error:
        return Outcome(REFUSED, reason=str(error))
    write_text(folder / SETTINGS, dump_yaml(settings))
    killed_before = kills_for_memory()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *launch_command(folder, ranks)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in LAUNCHERS},
            start_new_session=True,
        )
        code = wait_for(process, limit_s)
    said = (folder / LOG).read_text(encoding="utf-8", errors="replace").replace(str(folder / SETTINGS), str(run_file))
    if code == 0 and (folder / PEAKS).is_file():
        return Outcome(FITS, figures_of(folder, json.loads((folder / PEAKS).read_text(encoding="utf-8"))))
    if code is None:
        return Outcome(TOO_LONG, reason=f"not done after {limit_s / 60:g} minutes (--limit): {last_words(said)}")
    return how_it_failed(code, said, killed=kills_for_memory() > killed_before)


def launch_command(folder: Path, ranks: int) -> list[str]:
    """Arguments of python that start a trial's ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), f"--master_port={port}"]
    trial = ["--log_level=error", "--module", "dsdpo", "compare", str(folder / SETTINGS), "--trial", str(folder)]
    return [*launcher, *trial]


def wait_for(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None if it had to be ended at the limit. Raises `KeyboardInterrupt` if this process is to stop."""
    end = time.monotonic() + limit_s
    try:
        while (code := process.poll()) is None:
            if noted_signal():
                raise KeyboardInterrupt
            if time.monotonic() > end:
                return None
            time.sleep(0.1)
        return code
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and its ranks, of which some may be left after it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=ENDING_S)


def how_it_failed(code: int, said: str, *, killed: bool) -> Outcome:
    """What the exit code and the words of all ranks say of a trial that did not come to its end.

    `killed`: the kernel has ended a process for want of memory meanwhile.
    """
    if ON_DEVICE.search(said):
        return Outcome(NO_DEVICE_MEMORY, reason=first_line(ON_DEVICE, said))
    if NO_MEMORY.search(said):
        return Outcome(NO_HOST_MEMORY, reason=first_line(NO_MEMORY, said))
    if killed or code in KILLED or "exits with return code = -9" in said:
        who = "the kernel killed a process for want of memory" if killed else (
            "a rank was killed (SIGKILL), as the kernel does where memory runs out"
        )  # fmt: skip
        return Outcome(NO_HOST_MEMORY, reason=who)
    if code == BAD_INPUT:
        return Outcome(REFUSED, reason=last_words(said))
    return Outcome(FAILED, reason=f"exit code {code}: {last_words(said)}")


def first_line(pattern: re.Pattern[str], said: str) -> str:
    """The line in which the pattern is found first."""
    return next(line.strip() for line in said.splitlines() if pattern.search(line))


def last_words(said: str) -> str:
    """What a run says in the end: dsdpo's own message, else the last error, else the last line."""
    messages = [found.group(0) for found in RANK_ENDED.finditer(said)]
    ours = [line.split(": ", 1)[1] for line in messages if line.startswith("dsdpo")]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next(iter([*ours[:1], *messages[-1:], *lines[-1:]]), "it said nothing")


def kills_for_memory() -> int:
    """How many processes the kernel has ended for want of memory: of this container, else of this machine."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"):
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                return int(found[1])
    return 0
