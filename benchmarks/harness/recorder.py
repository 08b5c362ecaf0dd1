"""Inside a measured process: times turns of optimizer steps, and pauses between turns so that the other side can run.

The process that compares tells every rank by environment variable what to do, and when by files:

    warm-up steps ─ ready.RANK ─ wait for go.0 ─ steps ─ done.0.RANK ─ wait for go.1 ─ ... ─ result.RANK ─ exit
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "DSDPO_BENCHMARK"
STOP = "stop"  # the file by which a paused process is told that there will be no further turn
MIB = 2**20


class Recorder:
    """Call `step()` at the end of every optimizer step, on every rank."""

    def __init__(self) -> None:
        told = json.loads(os.environ[VARIABLE])
        self.folder = Path(told["folder"])
        self.warmup, self.steps, self.turns = told["warmup"], told["steps"], told["turns"]
        self.started_at: float = told["started_at"]
        self.rank = int(os.environ.get("RANK", "0"))
        self.done = 0
        self._wall = self._cpu = 0.0  # clocks at the start of the turn
        self.losses: list[float] = []
        self.notes: dict[str, list[float]] = {}
        self.result: dict[str, Any] = {"turns": []}

    def loss(self, value: float) -> None:
        """The loss of a step, over all ranks."""
        self.losses.append(value)

    def note(self, name: str, value: float) -> None:
        """Some other figure of a step."""
        self.notes.setdefault(name, []).append(value)

    def step(self) -> None:
        """The end of an optimizer step; waits here where a turn begins."""
        self.done += 1
        if self.done < self.warmup:
            return
        into, turn_over = self.done - self.warmup, (self.done - self.warmup) % self.steps == 0
        if not turn_over:
            return
        if into:
            synchronize()
            self.result["turns"].append(
                {"wall_s": time.perf_counter() - self._wall, "cpu_s": time.process_time() - self._cpu}
            )
            self._say(f"done.{into // self.steps - 1}.{self.rank}", {})
        else:
            self._before_first_turn()
        if into // self.steps < self.turns:
            self._wait(f"go.{into // self.steps}")
            self._wall, self._cpu = time.perf_counter(), time.process_time()
        else:
            self._leave()

    def _before_first_turn(self) -> None:
        synchronize()
        self.result["start"] = {"wall_s": time.time() - self.started_at, "cpu_s": time.process_time()}
        give_back_memory()
        self.result["start_peak_mib"] = peak_memory() / MIB
        self.result["resident_mib"] = held_memory() / MIB
        forget_peak()
        self._say(f"ready.{self.rank}", {})

    def _leave(self) -> None:
        """Hand the figures over and end the process: whatever the run would do from here on is not measured."""
        steps_peak = peak_memory() / MIB
        self.result["peak_mib"] = max(self.result["start_peak_mib"], steps_peak)
        self.result["step_mib"] = steps_peak - self.result["resident_mib"]
        self._say(f"result.{self.rank}", {**self.result, "losses": self.losses, "notes": self.notes})
        for other in range(int(os.environ.get("WORLD_SIZE", "1"))):  # which may still be waiting for a message of ours
            self._wait(f"result.{other}")
        sys.stdout.flush()
        os._exit(0)

    def _say(self, name: str, content: dict[str, Any]) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(content))
        partial.replace(self.folder / name)

    def _wait(self, name: str) -> None:
        while not (self.folder / name).exists():
            if (self.folder / STOP).exists():
                raise SystemExit("the comparison ended")
            time.sleep(0.005)


def on_cuda() -> bool:
    """Whether the run computes on CUDA devices."""
    import torch

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def synchronize() -> None:
    """Wait until the device has done what it was told."""
    if on_cuda():
        import torch

        torch.cuda.synchronize()


def held_memory() -> int:
    """Bytes of device memory in use, on a CPU of resident memory."""
    if on_cuda():
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def peak_memory() -> int:
    """The most bytes that were held at once since the last `forget_peak`."""
    if on_cuda():
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def forget_peak() -> None:
    """Let `peak_memory` start again."""
    if on_cuda():
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def give_back_memory() -> None:
    """Unused memory back to the system, so that what is held is what is used."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
