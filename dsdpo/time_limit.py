"""Stopping before a job's time is up: early enough for another step and a save, by how long those have taken."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import timedelta

from dsdpo.run_folder import RunFolder
from dsdpo.stop_signals import seconds_listened

UNMEASURED_SAVE_S = 120.0  # what a save is taken to last until one has been measured
SCORES_SAVE_S = 1.0  # the same where only scores are stored
SLACK_S = 30.0  # to close files, and for the launcher
MUCH = 0.25  # share of a job's time that is much to keep for its end


class TimeLimit:
    """How much of the time that a process has is left, and how much its end will take."""

    def __init__(self, limit_s: float, *, save_s: float = 0.0) -> None:
        """`save_s`: how long a save of this run took in an earlier job, 0 if that is not known."""
        self.limit_s, self.save_s = limit_s, save_s
        self._step_s = 0.0  # the longest time between two looks
        self._looked_at: float | None = None
        self._looked = self._warned = False

    @property
    def needed_s(self) -> float:
        """Seconds to keep: one more step and a save, each of which may take twice as long as the longest so far."""
        return 2 * self._step_s + 2 * self._one_save_s + SLACK_S

    @property
    def _one_save_s(self) -> float:
        return self.save_s or UNMEASURED_SAVE_S

    def is_near(self, *, saving: bool = False) -> bool:
        """Whether there is no time for another step, to be asked after each. Never at first: something must get on.

        `saving`: a checkpoint is still being written, and the last one waits for it.
        """
        now, first, self._looked = time.monotonic(), not self._looked, True
        if self._looked_at is not None:
            self._step_s = max(self._step_s, now - self._looked_at)
        self._looked_at = now
        needed_s = self.needed_s + (2 * self._one_save_s if saving else 0.0)
        return not first and seconds_listened() + needed_s > self.limit_s

    def waited(self) -> None:
        """Count nothing since the last look as a step: the run has been saving."""
        self._looked_at = None

    def saved(self, seconds: float) -> str | None:
        """Take note of how long a save took; a warning, once, if much of a job's time goes into its end."""
        self.save_s = max(self.save_s, seconds)
        if self._warned or self.needed_s < MUCH * self.limit_s:
            return None
        self._warned = True
        return (
            f"checkpoint.time_limit: of {self.limit_s:,.0f} s the last {self.needed_s:,.0f} are kept for a step "
            f"({self._step_s:.1f} s so far) and a save ({self.save_s:.1f} s), each taken twice: a longer job would "
            "train for more of its time"
        )


def time_limit_of(limit: timedelta | None, folder: RunFolder | None) -> TimeLimit | None:
    """A run's `checkpoint.time_limit`, if it has one; without a folder, of one that only scores.

    Ask before the run takes its folder, since `stopped.json` goes when it does.
    """
    if limit is None:
        return None
    save_s = SCORES_SAVE_S if folder is None else 0.0
    with suppress(OSError, ValueError, TypeError, KeyError):  # none, or of a run that had no limit
        if folder is not None:
            save_s = float(json.loads(folder.stopped.read_text())["save_s"])
    return TimeLimit(limit.total_seconds(), save_s=save_s)
