"""Stopping in good order: a signal to any rank, a file, or a deadline, agreed by all ranks when they ask.

One signalled rank is enough. A file needs no signal at all: `touch OUTPUT_DIR/STOP`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch

from dsdpo.atomic import write_json
from dsdpo.console import restarts_ranks
from dsdpo.distributed import max_over_ranks, rank
from dsdpo.errors import StoppedError, TrainingError
from dsdpo.run_folder import RunFolder
from dsdpo.run_lock import RunLock
from dsdpo.stop_signals import noted_signal, seconds_listened
from dsdpo.time_limit import TimeLimit

T = TypeVar("T")

STOPPED = 75  # exit code: saved and stopped early, to be started again with --resume auto (EX_TEMPFAIL)
_TIME_LIMIT, _FILE, _DEADLINE, _TAKEN = 1000, 1001, 1002, 1003  # codes beyond any signal number


class StopRequest:
    """Whether a run is to stop: asked after each step and between the batches of long scoring passes."""

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        deadline: timedelta | None,
        device: torch.device,
        lock: RunLock | None = None,
        time_limit: TimeLimit | None = None,
    ) -> None:
        """`deadline` counts from when signals began to be noted; without a `folder` there is no file to look for.

        With `lock`, a run whose folder another process has taken ends with an error.
        """
        self._file = folder.stop_file if folder else None
        self._deadline_s = None if deadline is None else deadline.total_seconds()
        self._device, self._lock, self._time_limit = device, lock, time_limit

    def reason(self, *, saving: bool = False) -> str | None:
        """Why to stop now, the same on every rank, or None; `saving`: a checkpoint is being written. Collective."""
        code = noted_signal()
        if self._time_limit is not None and self._time_limit.is_near(saving=saving):
            code = max(code, _TIME_LIMIT)
        if self._deadline_s is not None and seconds_listened() > self._deadline_s:
            code = _DEADLINE
        if rank() == 0 and self._file is not None and self._file.exists():
            code = _FILE
        if self._lock is not None and self._lock.taken_by is not None:
            code = _TAKEN
        return self._agreed(code)

    def check(self) -> None:
        """Raise `StoppedError` on all ranks if there is a reason to stop. Collective."""
        if reason := self.reason():
            raise StoppedError(reason)

    def check_signals(self) -> None:
        """Raise `StoppedError` on all ranks if one was sent a signal. Collective.

        For moments at which nothing has been done yet: a run that a short deadline ended there would never get on.
        """
        if reason := self._agreed(noted_signal()):
            raise StoppedError(reason)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items, equally many on all ranks; `check` before each. Collective."""
        for item in items:
            self.check()
            yield item

    def waited(self) -> None:
        """Do not count the time since the last step into the next one: a save took some of it."""
        if self._time_limit is not None:
            self._time_limit.waited()

    def saved(self, seconds: float) -> str | None:
        """Take note of how long a save took; what to warn of, if anything."""
        return None if self._time_limit is None else self._time_limit.saved(seconds)

    @property
    def save_s(self) -> float | None:
        """How long a save takes; None if that does not matter."""
        return None if self._time_limit is None else self._time_limit.save_s

    def _agreed(self, code: int) -> str | None:
        code = max_over_ranks(code, self._device)
        if code == 0:
            return None
        if code == _TAKEN:
            raise TrainingError(
                "output_dir: another run has taken the folder over, as this one gave no sign of life: it ends here and "
                "writes nothing more"
            )
        if code == _FILE:
            return f"the file {self._file}"
        if code == _TIME_LIMIT:
            return "checkpoint.time_limit"
        return "checkpoint.deadline" if code == _DEADLINE else signal.Signals(code).name


def stop_code(reason: str) -> int:
    """The exit code of a run that stopped early by `reason`: 75, for whoever starts it again.

    Where torchrun would start the ranks again at once, that is right after SIGTERM, which it sends when nodes come or
    go; a run that was asked to stop ends with 0 there.
    """
    return 0 if restarts_ranks() and reason != signal.SIGTERM.name else STOPPED


def record_stop(folder: RunFolder, *, reason: str, step: int, save_s: float | None = None) -> str:
    """Write into the run's folder why and where it stopped, take the stop file away; what to tell the user.

    `save_s`, how long saving took, is what the next start reckons with.
    """
    if rank() == 0:
        folder.stop_file.unlink(missing_ok=True)
        write_json(folder.stopped, {"reason": reason, "step": step} | ({"save_s": save_s} if save_s else {}))
    return f"stopped after step {step} by {reason}; everything is saved, go on with --resume auto"
