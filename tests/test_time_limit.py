"""A run that ends before its job does: by how long its steps and saves have taken."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest

from dsdpo import time_limit as module
from dsdpo.run_folder import RunFolder
from dsdpo.time_limit import TimeLimit, time_limit_of


class Clock:
    """Seconds since the process began, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "seconds_listened", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def steps_until_near(limit: TimeLimit, clock: Clock, *, step_s: float) -> float:
    """Look after each step; the time at which no other is taken."""
    for _ in range(10_000):
        clock.now += step_s
        if limit.is_near():
            return clock.now
    raise AssertionError("never near its end")


def test_keeps_twice_a_step_and_twice_a_save(clock: Clock) -> None:
    """Of 1,000 s, 2 x 10 s + 2 x 100 s + 30 s are kept: it stops at the first step that ends after 750 s."""
    assert steps_until_near(TimeLimit(1000, save_s=100), clock, step_s=10) == 760


def test_save_that_was_not_measured_is_taken_to_last_two_minutes(clock: Clock) -> None:
    assert steps_until_near(TimeLimit(1000), clock, step_s=10) == 720  # 20 + 240 + 30 s are kept
    clock.now = 0
    limit = TimeLimit(1000)
    limit.saved(5)
    assert steps_until_near(limit, clock, step_s=10) == 950  # 20 + 10 + 30 s


def test_longest_step_counts_and_a_save_between_two_steps_is_none(clock: Clock) -> None:
    limit = TimeLimit(10_000, save_s=100)
    for seconds in (10, 70, 10):
        clock.now += seconds
        limit.is_near()
    clock.now += 500
    limit.waited()
    clock.now += 10
    limit.is_near()
    assert limit.needed_s == 2 * 70 + 2 * 100 + 30


def test_keeps_two_saves_while_one_is_under_way(clock: Clock) -> None:
    """The last checkpoint waits for the one that is being written: 2 x 100 s more than without it."""
    limit = TimeLimit(1000, save_s=100)
    limit.is_near()
    clock.now = 600
    limit.waited()
    assert not limit.is_near()
    assert limit.is_near(saving=True)


def test_first_look_lets_a_run_get_on_however_short_its_time_is(clock: Clock) -> None:
    limit = TimeLimit(60)
    assert [limit.is_near(), limit.is_near()] == [False, True]


def test_warns_once_if_much_of_the_time_goes_into_the_end(clock: Clock) -> None:
    limit = TimeLimit(1000)
    assert limit.saved(10) is None
    warning = limit.saved(200)
    assert warning is not None
    assert "of 1,000 s the last 430 are kept" in warning
    assert limit.saved(300) is None


def test_next_job_knows_how_long_a_save_took(tmp_path: Path) -> None:
    folder, hour = RunFolder(tmp_path), timedelta(hours=1)
    assert time_limit_of(None, folder) is None
    unknown = time_limit_of(hour, folder)
    (tmp_path / "stopped.json").write_text('{"reason": "checkpoint.time_limit", "step": 7, "save_s": 55.5}')
    known = time_limit_of(hour, folder)
    assert unknown is not None
    assert known is not None
    assert (unknown.save_s, known.save_s) == (0.0, 55.5)
