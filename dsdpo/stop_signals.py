"""Signals that ask a run to stop, noted from its first second on; importing this needs no torch.

The deepspeed launcher passes SIGTERM to its ranks one after another, up to 30 s apart, and dies of SIGUSR1 without a
word to them. So a signal only leaves a note, which ranks tell each other when they next meet.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dsdpo.console import is_main

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INSIST_S = 1.0  # a second Ctrl-C that comes later than this ends the process at once; launchers repeat it sooner


class _Notes:
    """What this process has been told since it began to listen."""

    listening = False
    process = 0
    number = 0  # of the last signal; 0: none
    at = 0.0
    since = time.monotonic()


@contextmanager
def noted_signals() -> Iterator[None]:
    """A block in which SIGTERM, SIGINT and SIGUSR1 are noted; inside another such block, that one goes on."""
    if _Notes.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Notes.listening, _Notes.process, _Notes.number, _Notes.since = True, os.getpid(), 0, time.monotonic()
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Notes.listening, _Notes.number = False, 0


def noted_signal() -> int:
    """The number of the signal that this process was sent, 0 if none was."""
    return _Notes.number


def seconds_listened() -> float:
    """Since the block of `noted_signals` began, on the monotonic clock."""
    return time.monotonic() - _Notes.since


def _note(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Notes.process:  # a worker that was forked off, which its parent must be able to end
        if number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    now = time.monotonic()
    if number == signal.SIGINT and _Notes.number == signal.SIGINT and now - _Notes.at > INSIST_S:
        raise KeyboardInterrupt
    if not _Notes.number and is_main():
        name = signal.Signals(number).name
        hint = "; again to end at once" if number == signal.SIGINT else ""
        os.write(sys.stderr.fileno(), f"\ndsdpo: {name}: stopping as soon as the ranks next meet{hint}\n".encode())
    _Notes.number, _Notes.at = number, now
