"""Signals are noted from before torch is imported, and only by the process that they were sent to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from dsdpo.stop_signals import noted_signal, noted_signals


def test_signals_are_noted_and_forgotten_when_the_block_ends() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with noted_signals():
        with noted_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert noted_signal() == signal.SIGUSR1, "the inner block left it to the outer one"
    assert noted_signal() == 0
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    with noted_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as launchers repeat it
        assert noted_signal() == signal.SIGINT
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_workers_that_are_forked_off_can_be_ended() -> None:
    with noted_signals():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        time.sleep(0.5)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGUSR1)  # which a scheduler sends to all of a job
        time.sleep(0.5)
        assert worker.is_alive()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM
        assert noted_signal() == 0
