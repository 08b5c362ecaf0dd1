"""Runs the sides of a comparison as processes, turn about, and collects what their ranks report."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.common import ROOT, gpu_names
from benchmarks.harness.recorder import STOP, VARIABLE

# malloc then gives every larger block back at once, so that a peak is what was in use and not what was kept.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: how its ranks are started."""

    name: str
    module: str
    arguments: tuple[str, ...]
    folder: Path  # logs and reports
    ranks: int = 1
    launcher: str = "deepspeed"  # or accelerate; not used for one rank
    launcher_config: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    limit_s: float | None = None  # from its start on: then it is taken to hang
    hosted: tuple[str, ...] = ()  # a command line that starts all ranks elsewhere, in place of a launcher's

    def command(self) -> list[str]:
        """The command line that starts all ranks."""
        if self.hosted:
            return list(self.hosted)
        run = [self.module, *self.arguments]
        if self.launcher == "accelerate" and self.launcher_config:
            port = f"--main_process_port={free_port()}"
            config = f"--config_file={self.launcher_config}"
            return [sys.executable, "-m", "accelerate.commands.launch", config, port, "-m", *run]
        if self.ranks == 1:
            return [sys.executable, "-m", *run]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(self.ranks)]
        return [*command, f"--master_port={free_port()}", "--log_level=error", "--module", *run]


@dataclass
class Measured:
    """What the ranks of one side report, turn by turn and step by step."""

    turns: list[dict[str, float]] = field(default_factory=list)  # wall_s: of the slowest rank; cpu_s: of all ranks
    losses: list[float] = field(default_factory=list)  # of the first start
    notes: dict[str, list[float]] = field(default_factory=dict)  # of rank 0, of the first start
    memory: dict[str, float] = field(default_factory=dict)  # of the largest rank: resident_mib, step_mib, peak_mib
    starts: list[dict[str, float]] = field(default_factory=list)  # as turns, from start to the end of the warm-up


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment() -> dict[str, str]:
    """The environment of a measured process: one thread a rank on a CPU, nothing asked of any server."""
    scripts = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "TOKENIZERS_PARALLELISM": "false"}
    env.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    env.setdefault("HF_HUB_OFFLINE", "1")
    env["WANDB_MODE"] = "disabled"
    if not gpu_names():
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return env


class Running:
    """A side's processes, from start to report."""

    def __init__(self, side: Side, *, warmup: int, steps: int, turns: int) -> None:
        self.side, self.turns, self.started = side, turns, time.monotonic()
        side.folder.mkdir(parents=True)
        told = {
            "folder": str(side.folder),
            "warmup": warmup,
            "steps": steps,
            "turns": turns,
            "started_at": time.time(),
        }
        self.log = (side.folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            side.command(),
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**environment(), **_filled(side), VARIABLE: json.dumps(told)},
            start_new_session=True,
        )

    def wait_for(self, name: str) -> None:
        """Until every rank has said `name`. Raises with the end of the log if the run ends before or takes too long."""
        while not all((self.side.folder / f"{name}.{rank}").exists() for rank in range(self.side.ranks)):
            ended = self.process.poll() is not None and not (self.side.folder / f"{name}.0").exists()
            took = time.monotonic() - self.started
            if ended or took > (self.side.limit_s or float("inf")):
                how = f"ended with code {self.process.returncode}" if ended else f"not done in {took:.0f} s"
                tail = (self.side.folder / "log.txt").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self.side.name}: {how}\n{tail}")
            time.sleep(0.05)

    def turn(self, number: int) -> None:
        """Let the side run its next turn while all others wait."""
        (self.side.folder / f"go.{number}").touch()
        self.wait_for(f"done.{number}")

    def finish(self) -> list[dict[str, Any]]:
        """The reports of all ranks, once the run has ended."""
        self.wait_for("result")
        self.process.wait()
        self.log.close()
        names = [self.side.folder / f"result.{rank}" for rank in range(self.side.ranks)]
        return [json.loads(name.read_text()) for name in names]

    def stop(self) -> None:
        """End whatever still runs of it."""
        (self.side.folder / STOP).touch()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=30)
        self.log.close()


def end_with_children() -> None:
    """Make a signal to end an exception, so that what was started ends too."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def _filled(side: Side) -> dict[str, str]:
    """The side's own variables; `{folder}` in them is the folder of this start."""
    return {name: value.replace("{folder}", str(side.folder)) for name, value in side.environment.items()}


def run_sides(
    sides: Sequence[Side], *, rounds: int, steps: int, warmup: int = 2, starts: int = 1, seed: int = 0
) -> dict[str, Measured]:
    """Every side's figures after `rounds` rounds, in each of which every side runs `steps` steps, in random order.

    Sides run one at a time. They are started `starts` times over, between which the rounds are divided.
    """
    end_with_children()
    order = random.Random(seed)
    measured = {side.name: Measured() for side in sides}
    for start in range(starts):
        turns = rounds // starts + (start < rounds % starts)
        if not turns:
            continue
        running: list[Running] = []
        try:
            for side in sides:
                folder = side.folder / f"start{start}"
                running.append(Running(replace(side, folder=folder), warmup=warmup, steps=steps, turns=turns))
            for one in running:
                one.wait_for("ready")
            for turn in range(turns):
                for one in order.sample(running, len(running)):
                    one.turn(turn)
            for one in running:
                _add(measured[one.side.name], one.finish())
        finally:
            for one in running:
                one.stop()
    return measured


def measure_memory(sides: Sequence[Side], *, steps: int, warmup: int = 2) -> dict[str, Measured]:
    """Every side's memory, each in a run of its own under a malloc that keeps nothing back."""
    found: dict[str, Measured] = {}
    for side in sides:
        exact = replace(side, folder=side.folder / "memory", environment={**side.environment, **EXACT_MEMORY})
        found |= run_sides([exact], rounds=1, steps=steps, warmup=warmup)
    return found


def _add(measured: Measured, ranks: list[dict[str, Any]]) -> None:
    measured.turns += [_of_ranks(turn) for turn in zip(*(rank["turns"] for rank in ranks), strict=True)]
    measured.starts.append(_of_ranks([rank["start"] for rank in ranks]))
    if not measured.losses:
        measured.losses, measured.notes = ranks[0]["losses"], ranks[0]["notes"]
        fields = ("resident_mib", "step_mib", "peak_mib")
        measured.memory = {name: max(rank[name] for rank in ranks) for name in fields}


def _of_ranks(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {"wall_s": max(part["wall_s"] for part in parts), "cpu_s": sum(part["cpu_s"] for part in parts)}
