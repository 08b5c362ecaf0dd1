"""A trace of torch's profiler, read into the time of each step by kind of work, which adds up to the step.

On a CPU that is the own time of operators on the thread that trains. On a CUDA device it is what the device does at
each moment: of several kernels at once the computing one counts, and what a gather or a copy has run beside it is
hidden. While nothing runs there, the device waits for the host.
"""

from __future__ import annotations

import gzip
import heapq
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.kinds import (
    COLLECTIVE,
    COPY,
    DATA,
    HOST,
    NORM_RANGE,
    OPTIMIZER_PHASE,
    UNKNOWN,
    WAIT,
    kind_of_kernel,
    kind_of_operator,
    part_of_host,
)

LOG, TRAINS = "log", "forward_backward"  # phases of a step: the one that ends it, and one of the thread that trains
ON_HOST, ON_DEVICE = (
    ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"),
    ("kernel", "gpu_memcpy", "gpu_memset"),
)
BACKWARD = "autograd::engine::evaluate_function: "
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Split:
    """The seconds of one step on one rank."""

    wall: float
    kinds: dict[str, float]  # adding up to `wall`
    hidden: dict[str, float] = field(default_factory=dict)  # of a device: what ran beside computing kernels
    copied: float = 0.0  # bytes between host and device
    launches: float = 0.0  # kernels, on a CPU operators that compute
    unknown: dict[str, float] = field(default_factory=dict)  # by name
    host: dict[str, float] = field(default_factory=dict)  # on a CPU: what the host's time is spent in


@dataclass
class _Event:
    name: str
    category: str
    start: float  # µs
    end: float
    thread: Any
    arguments: dict[str, Any]
    parent: _Event | None = None
    inner: float = 0.0  # µs of what it encloses

    def stack(self) -> list[str]:
        """Its name and those of all that encloses it, outermost first."""
        names, event = [], self
        while event is not None:
            names.append(event.name)
            event = event.parent
        return names[::-1]


def read_trace(path: Path) -> list[Split]:
    """The steps of a Chrome trace, by their phases. Raises `ValueError` for one that has none."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return split_events(json.loads(text)["traceEvents"])


def split_events(raw: Iterable[dict[str, Any]]) -> list[Split]:
    """The same from the events of a trace."""
    events = [
        _Event(one["name"], one["cat"], one["ts"], one["ts"] + one["dur"], one["tid"], one.get("args", {}))
        for one in raw
        if one.get("ph") == "X" and one.get("cat") in (*ON_HOST, *ON_DEVICE)
    ]
    host = [event for event in events if event.category in ON_HOST]
    device = [event for event in events if event.category in ON_DEVICE]
    threads = {event.thread for event in host if event.name == TRAINS}
    if len(threads) != 1:
        raise ValueError("the trace has no phases of training steps: take one of a training run")
    (main,) = threads
    _nest(host)
    training = [event for event in host if event.thread == main]
    around = _Around(training)
    windows = _steps(training)
    if device:
        launches = {event.arguments.get("correlation"): event for event in host if "correlation" in event.arguments}
        return [_device_step(device, launches, training, host, around, *window) for window in windows]
    return [_host_step(training, around, *window) for window in windows]


def _nest(events: Sequence[_Event]) -> None:
    """Find what encloses each event on its thread."""
    open_on: dict[Any, list[_Event]] = {}
    for event in sorted(events, key=lambda one: (one.start, -one.end)):
        stack = open_on.setdefault(event.thread, [])
        while stack and stack[-1].end < event.end:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            event.parent.inner += event.end - event.start
        stack.append(event)


class _Around:
    """What an operator serves: what encloses it and, in a backward pass, what enclosed its forward operator.

    Each thread numbers its operators for itself. What a checkpoint computes anew on a thread of the backward pass has
    numbers of its own there, and no backward pass of its own.
    """

    def __init__(self, training: Sequence[_Event]) -> None:
        self._forward: dict[int, bool] = {}  # sequence numbers -> whether the operator was of a norm
        for event in sorted(training, key=lambda one: one.start):
            number = event.arguments.get("Sequence number")
            if number is not None and not event.arguments.get("Fwd thread id"):
                self._forward[number] = NORM_RANGE in event.stack()

    def __call__(self, event: _Event | None) -> list[str]:
        """The names, outermost first, the event's own last."""
        if event is None:
            return []
        names, at = event.stack(), event
        while at is not None and not at.name.startswith(BACKWARD):
            at = at.parent
        if at is not None and self._forward.get(at.arguments.get("Sequence number", -1)):
            names.insert(0, NORM_RANGE)
        return names


def _steps(training: Sequence[_Event]) -> Iterator[tuple[float, float, int]]:
    """Start, end and number of steps between two rows of metrics, after which a device has nothing left to do."""
    phases = [event for event in training if event.category == "user_annotation" and event.parent is None]
    start, last = min(event.start for event in phases), max(event.end for event in phases)
    ends = sorted(event.end for event in phases if event.name == LOG)
    ends = [*ends[:-1], last] if ends else [last]
    for end in ends:
        count = sum(start <= event.start < end for event in phases if event.name == OPTIMIZER_PHASE)
        if count:
            yield start, end, count
        start = end


def _host_step(training: Sequence[_Event], around: _Around, start: float, end: float, steps: int) -> Split:
    kinds: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    of_host: Counter[str] = Counter()
    computing = 0
    for event in training:
        if start <= event.start < end:
            own, kind = event.end - event.start - event.inner, kind_of_operator(around(event))
            kinds[kind] += own
            computing += kind not in (HOST, WAIT)
            if kind == UNKNOWN:
                unknown[event.name] += own
            if kind == HOST:
                of_host[part_of_host(event.name)] += own
    kinds[HOST] += end - start - sum(kinds.values())  # between phases
    split = _split(start, end, steps, kinds, unknown, launches=computing)
    return replace(split, host={part: MICROSECOND / steps * time for part, time in of_host.items()})


def _device_step(
    device: Sequence[_Event],
    launches: dict[Any, _Event],
    training: Sequence[_Event],
    host: Sequence[_Event],
    around: _Around,
    start: float,
    end: float,
    steps: int,
) -> Split:
    ran = [event for event in device if start <= event.start < end]
    found, unknown, copied = [], Counter[str](), 0.0
    for event in ran:
        kind = kind_of_kernel(event.name, around(launches.get(event.arguments.get("correlation"))))
        found.append((event.start, min(event.end, end), kind))
        if kind == COPY:
            copied += event.arguments.get("bytes", 0)
        if kind == UNKNOWN:
            unknown[event.name] += event.end - event.start
    kinds, idle = _timeline(found, start, end)
    waiting = [
        (event.start, event.end)
        for event in host
        if "Synchronize" in event.name or (event.name == DATA and event.parent is None)
    ]
    kinds[WAIT] = _overlap(idle, _merged(waiting))
    kinds[HOST] = sum(until - since for since, until in idle) - kinds[WAIT]
    whole: Counter[str] = Counter()
    for since, until, kind in found:
        whole[kind] += until - since
    hidden = {kind: MICROSECOND * (whole[kind] - kinds[kind]) / steps for kind in whole}
    return _split(start, end, steps, kinds, unknown, hidden, copied, len(ran))


def _split(
    start: float,
    end: float,
    steps: int,
    kinds: Counter[str],
    unknown: Counter[str],
    hidden: dict[str, float] | None = None,
    copied: float = 0.0,
    launches: int = 0,
) -> Split:
    each = MICROSECOND / steps
    return Split(
        each * (end - start),
        {kind: each * time for kind, time in kinds.items()},
        hidden or {},
        copied / steps,
        launches / steps,
        {name: each * time for name, time in unknown.most_common(20)},
    )


def _timeline(
    found: Sequence[tuple[float, float, str]], start: float, end: float
) -> tuple[Counter[str], list[tuple[float, float]]]:
    """Of each moment the kind that counts, summed, and the intervals in which nothing runs."""
    kinds: Counter[str] = Counter()
    idle: list[tuple[float, float]] = []
    later = {COLLECTIVE: 1, COPY: 2}  # which count where nothing computes
    queue = sorted(found)
    running: list[tuple[int, float, float, str]] = []
    now, at = start, 0
    while now < end:
        while at < len(queue) and queue[at][0] <= now:
            since, until, kind = queue[at]
            heapq.heappush(running, (later.get(kind, 0), since, until, kind))
            at += 1
        while running and running[0][2] <= now:
            heapq.heappop(running)
        following = queue[at][0] if at < len(queue) else end
        if running:
            until = min(running[0][2], following, end)
            kinds[running[0][3]] += until - now
        else:
            until = min(following, end)
            idle.append((now, until))
        now = until
    return kinds, idle


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for since, until in sorted(intervals):
        if merged and since <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until))
        else:
            merged.append((since, until))
    return merged


def _overlap(some: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """How long both are; `others` are sorted and apart."""
    starts, total = [since for since, _ in others], 0.0
    for since, until in some:
        for other_since, other_until in others[max(0, bisect_right(starts, since) - 1) :]:
            if other_since >= until:
                break
            total += max(0.0, min(until, other_until) - max(since, other_since))
    return total
