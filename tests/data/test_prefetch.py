"""BatchSource ahead of time: the same ones, as many as allowed, and a thread that ends with its reader."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.prefetch import pinned, prefetch
from dsdpo.errors import DataError
from tests.tiny import random_batch

CPU = torch.device("cpu")


def windows(count: int, log: list[int] | None = None) -> Iterator[tuple[PreferenceBatch, ...]]:
    """BatchSource of one batch each, whose number is logged as soon as it is made."""
    for index in range(count):
        if log is not None:
            log.append(index)
        yield (random_batch(2, seed=index),)


def until(true: Callable[[], bool]) -> bool:
    """Wait for it, up to a minute on a busy machine."""
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_same_windows_in_the_same_order() -> None:
    found = [batch.input_ids for (batch,) in prefetch(windows(7), CPU)]
    assert [ids.tolist() for ids in found] == [batch.input_ids.tolist() for (batch,) in windows(7)]
    assert threads() == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_stays_exactly_so_far_ahead(depth: int) -> None:
    """While its reader is busy with one window, the next `depth` are made, and not one more."""
    log: list[int] = []
    ahead = prefetch(windows(20, log), CPU, depth=depth)
    assert log == [], "nothing is made before the first is asked for"
    for taken in range(1, 4):
        next(ahead)
        assert until(lambda made=taken + depth: len(log) >= made)  # type: ignore[misc]
        time.sleep(0.05)
        assert log == list(range(taken + depth))
    ahead.close()


def test_an_error_comes_out_as_it_is_after_the_windows_before_it() -> None:
    def failing() -> Iterator[tuple[PreferenceBatch, ...]]:
        yield from windows(2)
        raise DataError("row 3 of pairs.jsonl")

    ahead = prefetch(failing(), CPU)
    assert len([next(ahead), next(ahead)]) == 2
    with pytest.raises(DataError, match=r"row 3 of pairs\.jsonl"):
        next(ahead)
    assert threads() == 0


@pytest.mark.parametrize("way", ["close", "drop", "error in the reader"])
def test_the_prefetch_thread_ends_with_its_reader(way: str) -> None:
    log: list[int] = []
    ahead = prefetch(windows(1000, log), CPU)
    next(ahead)
    assert threads() == 1
    if way == "close":
        ahead.close()
    elif way == "error in the reader":
        with pytest.raises(KeyError):
            ahead.throw(KeyError("reader"))
    else:
        del ahead
    assert threads() == 0
    assert len(log) <= 4


def test_the_process_can_exit_while_prefetching() -> None:
    """Whether the reader is forgotten in a global, or the thread is stuck in its source for ever."""
    program = """
import threading, torch
from dsdpo.data.prefetch import prefetch
from tests.tiny import random_batch
def stuck():
    yield (random_batch(1),)
    threading.Event().wait()
forgotten = prefetch(stuck(), torch.device("cpu")), prefetch([(random_batch(1),)] * 9, torch.device("cpu"))
for ahead in forgotten:
    next(ahead)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(prefetch(windows(5), CPU))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_batches_are_pinned_and_arrive_on_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batch = random_batch(2)
    assert pinned(batch).input_ids.is_pinned()
    assert pinned(batch).attention.attention_mask.is_pinned()
    for [found], [expected] in zip(prefetch(windows(4), device), windows(4), strict=True):
        assert found.input_ids.device == found.attention.attention_mask.device == device
        assert torch.equal(found.input_ids.cpu(), expected.input_ids)
