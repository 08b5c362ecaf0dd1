"""Saving that may fail: training goes on, and the checkpoint is tried again until the disk has room."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable

from dsdpo.config.run import CheckpointConfig
from dsdpo.distributed import rank
from dsdpo.errors import CheckpointError

log = logging.getLogger(__name__)


class Saver:
    """Writes checkpoints when called, and remembers that one is owed."""

    def __init__(self, write: Callable[[], None], settings: CheckpointConfig) -> None:
        """`write` raises `CheckpointError` on all ranks or none."""
        self._write = write
        self._attempts = settings.save_attempts
        self._pause_s = settings.save_pause.total_seconds()
        self._failed = 0
        self._again_at = 0
        self._lost: str | None = None

    def owed(self, step: int) -> bool:
        """Whether a checkpoint that could not be written is to be tried again after `step`."""
        return bool(self._failed) and step >= self._again_at

    def __call__(self, step: int, *, last: bool) -> None:
        """Write a checkpoint. Collective.

        After a failure the next attempts are 1, 2, 4, ... steps later, and the `CheckpointError` of the last one is
        raised. The `last` save has no step to come: it makes its attempts at once, with pauses, and leaves the error to
        `settle`, so that what was trained can still be exported.
        """
        if last:
            self._failed = 0
        while True:
            error = self._attempt()
            if error is None:
                if self._failed and rank() == 0:
                    log.warning("saved after step %d, after %d failed attempts", step, self._failed)
                self._failed = 0
                return
            self._failed += 1
            spent = self._failed >= self._attempts
            self._again_at = step + 2 ** (self._failed - 1)
            when = f"in {self._pause_s:g} s" if last else f"after step {self._again_at}"
            if rank() == 0:
                log.warning("NOT SAVED: %s. %s", error, "Given up" if spent else f"Make room: tried again {when}")
            if spent and last:
                self._lost = error
            elif spent:
                raise CheckpointError(error)
            if spent or not last:
                return
            time.sleep(self._pause_s)

    def _attempt(self) -> str | None:
        """Write; what went wrong, if anything. Collective."""
        try:
            self._write()
            return None
        except CheckpointError as caught:
            error = str(caught)
        # Tracebacks hold files open, and those take up room on the disk although they have been deleted.
        gc.collect()
        return error

    def settle(self) -> None:
        """Raise the `CheckpointError` of the last save, if it failed for good."""
        if self._lost is not None:
            raise CheckpointError(self._lost)
