"""Save with retries: where the disk fails, training goes on and the checkpoint is tried again later."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.run import CheckpointConfig
from dsdpo.disks import Disk
from dsdpo.distributed import all_or_none, rank
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError
from dsdpo.reference.base import Reference
from dsdpo.training.checkpoint import Retention, TrainState, checkpoint_path, save_checkpoint, writing
from dsdpo.training.metrics import Meter
from dsdpo.training.tracking import Tracker

log = logging.getLogger(__name__)


class Retries:
    """After which steps a checkpoint that could not be written is tried again: 1, 2, 4, ... steps later."""

    def __init__(self, attempts: int) -> None:
        """`attempts`: failures in a row that are one too many."""
        self.attempts = attempts
        self.failed = 0  # in a row
        self.again_at = 0

    def owed(self, step: int) -> bool:
        """Whether the next attempt is to be made after `step`."""
        return bool(self.failed) and step >= self.again_at

    def failed_at(self, step: int) -> bool:
        """Take note of a failure; whether it was the last that is allowed."""
        self.failed += 1
        self.again_at = step + 2 ** (self.failed - 1)
        return self.failed >= self.attempts


@dataclass
class Saver:
    """Writes a run's checkpoints, and remembers that one is owed."""

    settings: CheckpointConfig
    folder: Path  # of all checkpoints
    state: TrainState
    policy: TrainingEngine
    reference: Reference
    meter: Meter
    tracker: Tracker
    record: dict[str, Any]  # what every checkpoint says of the run's settings
    disk: Disk  # of the run's folder

    def __post_init__(self) -> None:
        self.retries = Retries(self.settings.save_attempts)
        self.lost: str | None = None  # why the last checkpoint could not be written
        self.saved: Path | None = None  # the checkpoint that the last `save` wrote, if it could

    def owed(self, step: int) -> bool:
        """Whether a checkpoint that could not be written is to be tried again after `step`."""
        return self.retries.owed(step)

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of the run as it stands. Collective.

        After a failure the next attempts are 1, 2, 4, ... steps later, and the `CheckpointError` of the last one is
        raised. The `last` save has no step to come: it makes its attempts at once, with pauses, and leaves the error to
        `raise_if_lost`, so that what was trained can still be exported.
        """
        retries, step = self.retries, self.state.step
        self.saved = None
        if last:
            retries.failed = 0
        while error := self._attempt():
            spent = retries.failed_at(step)
            pause_s = self.settings.save_pause.total_seconds()
            when = f"in {pause_s:g} s" if last else f"after step {retries.again_at}"
            if rank() == 0:
                log.warning("NOT SAVED: %s. %s", error, "Given up" if spent else f"Make room: tried again {when}")
            if spent and last:
                self.lost = error
            elif spent:
                raise CheckpointError(error)
            if spent or not last:
                return
            time.sleep(pause_s)
        if retries.failed and rank() == 0:
            log.warning("saved after step %d, after %d failed attempts", step, retries.failed)
        retries.failed = 0
        self.saved = checkpoint_path(self.folder, step)

    def _attempt(self) -> str | None:
        """Write a checkpoint and delete those no longer kept; what went wrong, if anything. Collective."""
        settings = self.settings
        try:
            with all_or_none(), writing(self.folder):
                self.tracker.sync()
            save_checkpoint(
                self.folder,
                self.state,
                policy=self.policy,
                reference=self.reference,
                meter=self.meter,
                record=self.record | {"evaluation": self.tracker.evaluation_of(self.state.step)},
                keep=Retention(last=settings.keep_last, best=settings.keep_best, metric=settings.best_metric),
                disk=self.disk,
            )
            return None
        except CheckpointError as caught:
            error = str(caught)
        # Tracebacks hold files open, and those take up room on the disk although they have been deleted.
        gc.collect()
        return error

    def raise_if_lost(self) -> None:
        """Raise the `CheckpointError` of the last save, if it failed for good."""
        if self.lost is not None:
            raise CheckpointError(self.lost)
