"""BatchSource made ahead of time by a thread, so that the device never waits for the host to lay out a batch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import fields, is_dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.steps import StepBatches

W = TypeVar("W", StepBatches, tuple[PreferenceBatch, ...])

END = object()


def prefetch(windows: Iterable[W], device: torch.device, *, depth: int = 2) -> Generator[W, None, None]:
    """The windows in their order, on `device`, while a thread reads and lays out up to `depth` windows ahead.

    For a CUDA device the thread also pins them, and the copy to the device is queued without waiting. What `windows`
    raises is raised here. The thread starts with the first window asked for and ends with the generator, whether that
    is read to its end, closed or thrown away; it draws no random numbers.
    """
    ready: SimpleQueue[Any] = SimpleQueue()  # windows, then END or an exception
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a new thread starts on device 0, and pinning would take memory there
            source = iter(windows)
            while room.acquire() and not stopped.is_set():
                window: Any = next(source, END)
                if window is not END and device.type == "cuda":
                    window = with_batches(window, pinned)
                ready.put(window)
                if window is END:
                    return
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (window := ready.get()) is not END:
            if isinstance(window, BaseException):
                raise window
            room.release()
            yield with_batches(window, lambda batch: batch.to(device))
    finally:
        stopped.set()
        room.release()
        if not sys.is_finalizing():  # daemon threads are frozen by then: joining one would hang
            thread.join()


def with_batches(window: W, change: Callable[[PreferenceBatch], PreferenceBatch]) -> W:
    """The window with each of its batches changed."""
    if isinstance(window, StepBatches):
        return replace(window, batches=tuple(change(batch) for batch in window.batches))
    return tuple(change(batch) for batch in window)


def pinned(value: Any) -> Any:
    """A batch with every tensor in it, at whatever depth, in page-locked memory."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: pinned(getattr(value, field.name)) for field in fields(value)})
    return value
