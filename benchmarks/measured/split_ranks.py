"""Inside the processes of `benchmarks.step_split`: a run of whose turns every second one is traced by torch's profiler.

    python -m benchmarks.measured.split_ranks RUN.yaml                             (or under the deepspeed launcher)

Named ranges are added to the trace where operators and kernels do not tell what they serve: norms, rotary embeddings,
and what DeepSpeed does around them. They are there in turns that are not traced too, where they cost next to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.kinds import DEEPSPEED, NORM_RANGE
from benchmarks.harness.recorder import Recorder, on_cuda
from dsdpo.config.load import load_run, run_parser
from dsdpo.console import quiet_libraries
from dsdpo.data.steps import StepBatches
from dsdpo.engine.build import device
from dsdpo.engine.lora import POLICY
from dsdpo.engine.shards import full_shape
from dsdpo.objective.flops import model_flops, pair_work, step_flops
from dsdpo.run.loop import train_until_done
from dsdpo.run.output_folder import opened_folder
from dsdpo.run.plan import plan_run
from dsdpo.run.run import Run, build_run
from dsdpo.stop_request import StopRequest
from dsdpo.training.callbacks import Callbacks, Event
from dsdpo.training.perf import Perf
from dsdpo.training.profiler import StepProfiler

ROTARY = "apply_rotary_pos_emb"


def main(argv: list[str]) -> None:
    """Train until the recorder ends the process."""
    settings, flags = load_run(
        argv, run_parser("benchmarks.measured.split_ranks", "A run some of whose turns are traced.")
    )
    quiet_libraries(verbose=False)
    plan = plan_run(settings, run_file=flags.run)
    recorder = Recorder()

    def report(event: Event) -> None:
        recorder.loss(event.metrics.get("loss", float("nan")))
        for name, value in event.metrics.items():
            if name.startswith(("time/", "perf/", "memory/", "comm/")):
                recorder.note(name, value)

    with opened_folder(plan) as (folder, checkpoint, lock):
        stop = StopRequest(folder, deadline=None, device=device(), lock=lock)
        run = build_run(plan, folder, checkpoint, stop, Callbacks((report,), all_ranks=True))
        traced = replace(run, perf=NotedPerf(run, recorder), profiler=TurnProfiler(recorder, folder.profile))
        with named_ranges():
            train_until_done(traced)


class NotedPerf(Perf):
    """A run's figures, whose recorder is also told the work of each step."""

    def __init__(self, run: Run, recorder: Recorder) -> None:
        policy = model_flops(run.policy.module.lm, adapter=POLICY, shape_of=full_shape)
        scored_by = run.reference.model_for_flops()
        reference = model_flops(scored_by[0], adapter=scored_by[1], shape_of=full_shape) if scored_by else None
        peak = run.plan.run.tracking.peak_tflops
        super().__init__(device(), step_flops=partial(step_flops, policy=policy, reference=reference), peak=peak)
        self._models, self._recorder = (policy, reference), recorder
        trained = sum(
            parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
            for parameter in run.policy.module.parameters()
            if parameter.requires_grad
        )
        recorder.note("work/trained", float(trained))
        recorder.note("work/reference", float(reference is not None))

    def count(self, window: StepBatches) -> None:
        super().count(window)
        for name, value in work_of(window.lengths, *self._models).items():
            self._recorder.note(f"work/{name}", value)


def work_of(lengths: np.ndarray, policy: Any, reference: Any) -> dict[str, float]:
    """What a step's pairs ask for, of all ranks together: operations by kind, and tokens."""
    windows = tuple({*policy.attention, *(reference.attention if reference else ())})
    work = pair_work(lengths, windows)
    passes = [policy.forward, policy.backward, *([reference.forward] if reference else [])]
    without = {"trunk": replace(work, tokens=0.0), "head": replace(work, scored=0.0)}
    whole = sum(one(work) for one in passes)
    found = {name: whole - sum(one(less) for one in passes) for name, less in without.items()}
    attention = whole - sum(found.values())
    return {**found, "attention": attention, "tokens": work.tokens, "scored": work.scored}


class TurnProfiler(StepProfiler):
    """Traces every second turn, a file for each, and tells the recorder of the end of each step."""

    def __init__(self, recorder: Recorder, folder: Any) -> None:
        super().__init__(None, folder)
        self._recorder, self._trace = recorder, None

    def after_step(self, step: int) -> None:
        recorder = self._recorder
        if step == 0:
            return
        into = recorder.done + 1 - recorder.warmup  # steps of turns that are done with this one
        turn, rest = divmod(into, recorder.steps)
        starts = into >= 0 and rest == 0
        if starts and self._trace is not None:
            self._trace.stop()
            self._trace.export_chrome_trace(str(recorder.folder / f"trace-{turn - 1}.{recorder.rank}.json"))
            self._trace = None
        elif into == 0:
            with _profile():  # the first one takes time to start
                pass
        recorder.step()
        if starts and turn % 2 and turn < recorder.turns:
            self._trace = _profile()
            self._trace.start()


def _profile() -> Any:
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda())


@contextmanager
def named_ranges() -> Iterator[None]:
    """A block in whose traces norms, rotary embeddings and what DeepSpeed does around them have names.

    Models must have been made before: rotary embeddings are functions of their modules.
    """
    with ExitStack() as stack:
        for add in (_norms_named, _rotary_named, _deepspeed_named):
            stack.enter_context(add())
        yield


@contextmanager
def _norms_named() -> Iterator[None]:
    inside: list[tuple[nn.Module, record_function]] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__.endswith(("Norm", "RotaryEmbedding")):
            inside.append((module, record_function(NORM_RANGE)))
            inside[-1][1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if inside and inside[-1][0] is module:
            inside.pop()[1].__exit__(None, None, None)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def _rotary_named() -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.models.") and ROTARY in vars(module):
                stack.callback(setattr, module, ROTARY, vars(module)[ROTARY])
                setattr(module, ROTARY, _ranged(vars(module)[ROTARY], NORM_RANGE))
        yield


@contextmanager
def _deepspeed_named() -> Iterator[None]:
    """DeepSpeed's own ranges, which go to NVTX on CUDA and nowhere on a CPU, and stages 1 and 2, which have none."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    accelerator, opened = get_accelerator(), list[record_function]()

    def push(name: str, **_: Any) -> None:
        opened.append(record_function(f"{DEEPSPEED}{name}"))
        opened[-1].__enter__()

    def pop(**_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    accelerator.range_push, accelerator.range_pop = push, pop
    with ExitStack() as stack:
        stack.callback(lambda: (delattr(accelerator, "range_push"), delattr(accelerator, "range_pop")))
        for name in ("process_gradients", "independent_gradient_partition_epilogue"):
            before = getattr(DeepSpeedZeroOptimizer, name)
            stack.callback(setattr, DeepSpeedZeroOptimizer, name, before)
            setattr(DeepSpeedZeroOptimizer, name, _ranged(before, f"{DEEPSPEED}{name}"))
        yield


def _ranged(function: Callable[..., Any], range_name: str) -> Callable[..., Any]:
    @wraps(function)
    def named(*arguments: Any, **options: Any) -> Any:
        with record_function(range_name):
            return function(*arguments, **options)

    return named


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--local_rank")])
