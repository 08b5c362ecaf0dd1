"""Save in the background and with retries: where the disk fails, training goes on and tries again later."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.run import CheckpointConfig
from dsdpo.disks import Disk
from dsdpo.distributed import all_or_none, max_over_ranks, met, rank
from dsdpo.engine.build import device
from dsdpo.engine.quirks.put_off import HostCopies
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError, DsdpoError
from dsdpo.reference.base import Reference
from dsdpo.training.checkpoint import Retention, TrainState, writing
from dsdpo.training.metrics import Meter
from dsdpo.training.saving import Saving, begin_checkpoint, finish_checkpoint
from dsdpo.training.tracking import Tracker

log = logging.getLogger(__name__)
MEET_S = 20.0  # that ranks wait for each other when an error ends the run


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


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has got its name."""

    path: Path
    step: int
    evaluation: dict[str, float]  # held-out metrics, if they were taken after that step
    seconds: float  # that it took, on the slowest rank


@dataclass
class Saver:
    """Writes a run's checkpoints, at most one at a time beside training, and remembers that one is owed."""

    settings: CheckpointConfig
    folder: Path  # of all checkpoints
    state: TrainState
    policy: TrainingEngine
    reference: Reference
    meter: Meter
    tracker: Tracker
    record: dict[str, Any]  # what every checkpoint says of the run's settings
    disk: Disk  # of the run's folder
    copies: HostCopies | None = None  # what is written in the background is copied there; None: nothing is

    def __post_init__(self) -> None:
        self.retries = Retries(self.settings.save_attempts)
        self.lost: str | None = None  # why the last checkpoint could not be written
        self.in_flight: Saving | None = None  # being written by a thread of each rank
        self._named: list[Saved] = []
        self._said_slow = False

    def owed(self, step: int) -> bool:
        """Whether a checkpoint that could not be written is to be tried again after `step`."""
        return self.in_flight is None and self.retries.owed(step)

    def take_named(self) -> list[Saved]:
        """The checkpoints that have got their names since the last call, oldest first."""
        named, self._named = self._named, []
        return named

    def save(self, *, last: bool) -> None:
        """Take a checkpoint of the run as it stands; the `last` is written there and then. Collective.

        One that is still being written is finished first. After a failure the next attempts are 1, 2, 4, ... steps
        later, and the `CheckpointError` of the last one is raised. The `last` save has no step to come: it makes its
        attempts at once, with pauses, and leaves the error to `raise_if_lost`, so that what was trained can still be
        exported.
        """
        if self.in_flight is not None:
            self._say_if_slow(last=last)
            self._finish(self.in_flight, when="at once", raises=not last)
        if last:
            self.retries.failed, self.lost = 0, None
        while error := self._attempt(last=last):
            pause_s = self.settings.save_pause.total_seconds()
            spent = self._fails(error, when=f"in {pause_s:g} s" if last else None)
            if spent and last:
                self.lost = error
            elif spent:
                raise CheckpointError(error)
            if spent or not last:
                return
            time.sleep(pause_s)

    def look(self) -> None:
        """Give the checkpoint in flight its name, if all ranks have written it; to be asked after a step. Collective.

        What failed on any rank is tried again later, or raised, as `save` says.
        """
        if self.in_flight is not None and not self.in_flight.is_under_way():
            self._finish(self.in_flight)

    def settle(self) -> None:
        """Finish the checkpoint in flight when an error ends the run, if all ranks come here. Never raises."""
        if self.in_flight is None or not met(f"settle/{self.in_flight.final}", MEET_S):
            return
        try:
            self._finish(self.in_flight)
        except (DsdpoError, RuntimeError) as error:  # the latter from a process group without some ranks
            log.warning("NOT SAVED: %s", error)

    def _finish(self, saving: Saving, *, when: str | None = None, raises: bool = True) -> None:
        """Give a checkpoint its name once it is written. Collective. Raises `CheckpointError` as `save` does."""
        self.in_flight = None
        if (error := self._tried(lambda: self._name(saving))) and self._fails(error, when=when) and raises:
            raise CheckpointError(error)

    def _attempt(self, *, last: bool) -> str | None:
        """Write a checkpoint, or begin to; what went wrong, if anything. Collective."""
        copies = None if last else self.copies

        def attempt() -> None:
            with all_or_none(), writing(self.folder):
                self.tracker.sync()
            saving = begin_checkpoint(
                self.folder,
                self.state,
                policy=self.policy,
                reference=self.reference,
                meter=self.meter,
                record=self.record | {"evaluation": self.tracker.evaluation_of(self.state.step)},
                disk=self.disk,
                copies=copies,
            )
            if copies is None:
                self._name(saving)
            else:
                self.in_flight = saving

        return self._tried(attempt)

    def _tried(self, attempt: Callable[[], None]) -> str | None:
        """What went wrong in an attempt, if anything."""
        try:
            attempt()
            return None
        except CheckpointError as caught:
            error = str(caught)
        # Tracebacks hold files open, and those take up room on the disk although they have been deleted.
        gc.collect()
        return error

    def _name(self, saving: Saving) -> None:
        """Give a checkpoint its name, and delete those no longer kept. Collective."""
        settings, step = self.settings, saving.progress["step"]
        keep = Retention(last=settings.keep_last, best=settings.keep_best, metric=settings.best_metric)
        waited = time.monotonic()
        path = finish_checkpoint(saving, keep)
        seconds = saving.seconds + time.monotonic() - waited
        seconds = max_over_ranks(round(1000 * seconds), device()) / 1000
        if self.retries.failed and rank() == 0:
            log.warning("saved after step %d, after %d failed attempts", step, self.retries.failed)
        self.retries.failed = 0
        self._named.append(Saved(path, step, saving.progress["evaluation"], seconds))

    def _fails(self, error: str, *, when: str | None) -> bool:
        """Take note of a failure and say it, with `when` the next attempt is; whether it was the last allowed."""
        spent = self.retries.failed_at(self.state.step)
        when = when or f"after step {self.retries.again_at}"
        if rank() == 0:
            log.warning("NOT SAVED: %s. %s", error, "Given up" if spent else f"Make room: tried again {when}")
        return spent

    def _say_if_slow(self, *, last: bool) -> None:
        """Say, once, that training waits for the disk. Collective."""
        saving = self.in_flight
        if last or self._said_slow or saving is None or not saving.is_under_way():
            return
        self._said_slow = True
        if rank() == 0:
            log.warning(
                "the checkpoint after step %d waits for that of step %d, which is still being written: the disk takes "
                "longer than the steps between (checkpoint.every_steps)",
                self.state.step,
                saving.progress["step"],
            )

    def raise_if_lost(self) -> None:
        """Raise the `CheckpointError` of the last save, if it failed for good."""
        if self.lost is not None:
            raise CheckpointError(self.lost)
