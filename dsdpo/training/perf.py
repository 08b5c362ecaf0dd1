"""How fast a run is, how near to what its devices can do, and where the rest of the time goes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dsdpo.config.run import RunConfig
from dsdpo.data.steps import StepBatches
from dsdpo.distributed import max_over_ranks, values_of_ranks, world_size
from dsdpo.engine.build import device
from dsdpo.engine.lora import POLICY
from dsdpo.engine.quirks.gather_trace import GATHERED, STALLS
from dsdpo.engine.shards import full_shape
from dsdpo.engine.types import TrainingEngine
from dsdpo.estimate.hardware import peak_tflops
from dsdpo.objective.flops import model_flops, step_flops
from dsdpo.reference.base import Reference
from dsdpo.training.metrics import Meter

T = TypeVar("T")

MODEL_PHASES = ("reference", "forward_backward")
PHASES = ("data", *MODEL_PHASES, "optimizer", "sync", "log", "other")  # of a step
ASIDE = ("evaluate", "samples", "save")


class Laps:
    """How much a reading that only grows has grown in each phase."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._last = read()
        self._sums: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """Everything since the last mark belongs to `phase`."""
        now = self._read()
        self._sums[phase] = self._sums.get(phase, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The sums of all phases since the last taking."""
        sums, self._sums = self._sums, {}
        return sums


class DeviceLaps:
    """The same for seconds on a CUDA device's own clock: marks are queued like kernels, and only taking waits.

    On the host's clock a phase would end when its kernels are queued, and all of a step's time stand where the host
    happens to wait for the device.
    """

    def __init__(self) -> None:
        self._last = _event()
        self._marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(self, phase: str) -> None:
        self._marks.append((phase, _event()))

    def take(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        if self._marks:
            self._marks[-1][1].synchronize()
        for phase, event in self._marks:
            sums[phase] = sums.get(phase, 0.0) + self._last.elapsed_time(event) / 1000.0
            self._last = event
        self._marks = []
        return sums


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Perf:
    """Figures of the steps since the last reading. What happens between two phases counts to the second."""

    def __init__(
        self, device: torch.device, *, step_flops: Callable[[np.ndarray], float], peak: float | None = None
    ) -> None:
        """`step_flops`: operations a step on pairs of these lengths needs; `peak`: TFLOP/s of one device, if known."""
        self._device, self._step_flops = device, step_flops
        if peak is None and device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device))
        self._peak = peak
        self._seconds: Laps | DeviceLaps = DeviceLaps() if device.type == "cuda" else Laps(time.perf_counter)
        self._gathers = Laps(lambda: GATHERED.parameters)
        self._gathered_bytes = Laps(lambda: GATHERED.bytes)
        self._restart()

    def _restart(self) -> None:
        self._steps = self._pairs = self._tokens = self._computed = self._padding = self._heaviest = self._load = 0
        self._flops = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block whose time and gathers count to the phase `name`, and that a profile calls so."""
        STALLS.on = name in MODEL_PHASES and world_size() > 1
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            STALLS.on = False
        for laps in (self._seconds, self._gathers, self._gathered_bytes):
            laps.mark(name)

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time to get one counts to the phase `name`."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def count(self, window: StepBatches) -> None:
        """Take note of a finished step."""
        self._steps += 1
        self._pairs += window.pairs
        self._tokens += window.tokens
        self._computed += window.computed
        self._padding += window.padding
        self._heaviest += max(window.loads) * len(window.loads)
        self._load += sum(window.loads)
        self._flops += self._step_flops(window.lengths)

    def read(self, meter: Meter) -> dict[str, float]:
        """The meter's means and the figures of the steps beside them, and start again. Collective."""
        seconds = self._seconds.take()
        # Times are means over ranks: a rank that waits for its data makes the others wait in their next collective.
        own = {phase: seconds.get(phase, 0.0) for phase in (*PHASES, *ASIDE)}
        stragglers = self._stragglers(sum(own[phase] for phase in ("data", *MODEL_PHASES)) - STALLS.take())
        own |= {"computed": float(self._computed), "padding": float(self._padding)}
        means = meter.read(own, device=self._device)
        own = {name: means.pop(name) for name in own}
        peak_memory_gib = max_over_ranks(peak_memory(self._device), self._device) / 2**30
        figures = {**self._speed(own), **self._gathered(), **stragglers, "memory/peak_gib": peak_memory_gib}
        self._restart()
        return means | figures

    def _stragglers(self, busy_s: float) -> dict[str, float]:
        """The rank that others wait for, and how long they do in a step; nothing on one rank. Collective.

        `busy_s`: this rank's seconds of getting data and of computing, without its waiting for gathers.
        """
        if world_size() == 1:
            return {}
        every = values_of_ranks(busy_s / self._steps, self._device)
        slowest = max(every)
        return {
            "time/slowest_rank": float(every.index(slowest)),
            "perf/imbalance_s": slowest - sum(every) / len(every),
        }

    def _speed(self, own: dict[str, float]) -> dict[str, float]:
        """Throughput and where the time goes, from means over ranks."""
        total, ranks = sum(own[phase] for phase in PHASES), world_size()
        tflops = self._flops / total / ranks / 1e12
        return {
            "perf/pairs_per_s": self._pairs / total,
            "perf/tokens_per_s": self._tokens / total,
            "perf/tokens_per_s_per_device": self._tokens / total / ranks,
            "perf/tflops_per_device": tflops,
            **({"perf/mfu": tflops / self._peak} if self._peak else {}),
            "perf/overhead_share": 1.0 - sum(own[phase] for phase in MODEL_PHASES) / total,
            "perf/padding_share": own["padding"] / own["computed"],
            "perf/sharing_ratio": self._tokens / (own["computed"] * ranks),
            "perf/imbalance": self._heaviest / self._load,
            "time/step_s": total / self._steps,
            **{f"time/{phase}_s": own[phase] / self._steps for phase in PHASES},
            **{f"time/{phase}_s": own[phase] for phase in ASIDE if own[phase]},
        }

    def _gathered(self) -> dict[str, float]:
        """What ZeRO-3 gathered on this rank per step, and on every other alike."""
        parameters, sizes = self._gathers.take(), self._gathered_bytes.take()
        in_steps = [phase for phase in PHASES if phase in parameters]
        return {
            "comm/gathers": sum(parameters[phase] for phase in in_steps) / self._steps,
            "comm/gathered_gib": sum(sizes[phase] for phase in in_steps) / self._steps / 2**30,
            "comm/reference_gathers": parameters.get("reference", 0.0) / self._steps,
            "comm/reference_gathered_gib": sizes.get("reference", 0.0) / self._steps / 2**30,
        }


def perf_of(run: RunConfig, policy: TrainingEngine, reference: Reference) -> Perf:
    """Figures of a run from now on, held against the operations that its two models need."""
    scored_by = reference.model_for_flops()
    operations = partial(
        step_flops,
        policy=model_flops(policy.module.lm, adapter=POLICY, shape_of=full_shape),
        reference=model_flops(scored_by[0], adapter=scored_by[1], shape_of=full_shape) if scored_by else None,
    )
    return Perf(device(), step_flops=operations, peak=run.tracking.peak_tflops)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at a time: of a CUDA device's memory, else of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
