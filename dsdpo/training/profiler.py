"""A trace of some steps by torch.profiler, with the phases of a step by name, and of CUDA memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dsdpo.console import say
from dsdpo.distributed import rank


class StepProfiler:
    """Traces this rank from the end of one step to the end of a later one; does nothing if no steps are asked for."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        """`steps`: the first and the last to be traced, counted from 1; `folder` is made when a trace is written."""
        self._steps, self._folder = steps, folder
        self._profile: Any = None
        self._on_cuda = torch.cuda.is_available()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()  # of a run that ends before its last traced step

    def after_step(self, step: int) -> None:
        """Start or end the trace, if it is time; 0 is the start."""
        if self._steps is None:
            return
        first, last = self._steps
        if step == last:
            self._finish()
        elif step + 1 == first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_cuda
            if self._on_cuda:  # without C++ stacks, which slow a step
                torch.cuda.memory._record_memory_history(stacks="python")
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"rank-{rank()}.trace.json.gz"))
        self._profile = None
        memory = "no memory snapshot, which needs a CUDA device"
        if self._on_cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"rank-{rank()}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            memory = "a memory snapshot of each rank for pytorch.org/memory_viz"
        say(f"profile: a trace of each rank in {self._folder}, for chrome://tracing or Perfetto; {memory}")
