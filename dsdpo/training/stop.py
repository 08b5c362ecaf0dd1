"""Stopping in good order: a signal to any rank, a file, or a deadline, agreed by all ranks between two steps.

The deepspeed launcher passes SIGTERM to its ranks one after another, up to 30 s apart, and dies of SIGUSR1 without a
word to them. So a signal only sets a flag, ranks tell each other after every step, and one signalled rank is enough. A
file needs no signal at all: `touch OUTPUT_DIR/STOP`.
"""

from __future__ import annotations

import json
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch

from dsdpo.distributed import max_over_ranks, rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "STOP"
RECORD = "stopped.json"
_FILE, _DEADLINE = 1000, 1001  # codes beyond any signal number


class StopRequest:
    """Listens while a run trains; `reason` is asked after each step."""

    def __init__(self, folder: Path, *, deadline: timedelta | None, device: torch.device) -> None:
        """`deadline` counts from now, on a clock that nobody sets."""
        self._file = folder / STOP_FILE
        self._deadline = None if deadline is None else time.monotonic() + deadline.total_seconds()
        self._device = device
        self._signal = 0

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def reason(self) -> str | None:
        """Why to stop now, the same on every rank, or None. Collective."""
        code = self._signal
        if self._deadline is not None and time.monotonic() > self._deadline:
            code = _DEADLINE
        if rank() == 0 and self._file.exists():
            code = _FILE
        code = max_over_ranks(code, self._device)
        if code == 0:
            return None
        if code == _FILE:
            return f"the file {self._file}"
        return "checkpoint.deadline" if code == _DEADLINE else signal.Signals(code).name


def record_stop(folder: Path, *, reason: str, step: int) -> str:
    """Write into the run's folder why and where it stopped, take the stop file away; what to tell the user."""
    if rank() == 0:
        (folder / STOP_FILE).unlink(missing_ok=True)
        record = {"reason": reason, "step": step}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return f"stopped after step {step} by {reason}; everything is saved, go on with --resume auto"
