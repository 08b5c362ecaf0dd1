"""Inside the processes of `benchmarks.saves`: a run that saves at once, in the background and not at all, by turns.

python -m benchmarks.measured.save_ranks ROUNDS STEPS RUN.yaml                 (or under the deepspeed launcher)
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import dsdpo.commands.train as command
from benchmarks.harness.recorder import synchronize
from benchmarks.measured.precompute_ranks import report
from dsdpo.__main__ import main as run_command
from dsdpo.distributed import barrier
from dsdpo.engine.build import device
from dsdpo.engine.quirks.put_off import HostCopies
from dsdpo.run.background import copied_bytes
from dsdpo.run.loop import take_step
from dsdpo.run.run import Run
from dsdpo.training.checkpoint import Retention
from dsdpo.training.saving import Saving, begin_checkpoint, finish_checkpoint

MIB = 2**20


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    rounds, steps = int(argv[0]), int(argv[1])

    def measure(run: Run) -> None:
        windows = run.plan.training_windows(device())
        with closing(windows):
            taken = run.reference.along(windows, after=0)

            def step() -> None:
                take_step(run, *next(taken))

            step()  # warm-up
            copies = HostCopies()
            in_background(run, copies, step, steps)  # which takes the memory
            held = sum(size * len(spare) for size, spare in copies._spare.items()) / MIB
            kinds = {
                "none": partial(without, step, steps),
                "at once": partial(at_once, run),
                "background": partial(in_background, run, copies, step, steps),
            }
            order = random.Random(0)
            found = [{kind: kinds[kind]() for kind in order.sample(sorted(kinds), 3)} for _ in range(rounds)]
        memory = {"held_mib": held, "said_mib": copied_bytes(run.plan, run.policy) / MIB}
        report([*found, {"memory": memory}], pairs=len(run.plan.train.pairs))

    command.train_until_done = measure
    return run_command(["train", *argv[2:]])


def without(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Steps while nothing is saved."""
    return {"steps": [timed(step) for _ in range(steps)]}


def at_once(run: Run) -> dict[str, Any]:
    """A save that training waits for."""
    return {"stall": timed(lambda: finish_checkpoint(begin(run, None), Retention(last=1)))}


def in_background(run: Run, copies: HostCopies, step: Callable[[], None], steps: int) -> dict[str, Any]:
    """A save beside steps: what training waits for before and after, and the steps that it is under way during."""
    saving: list[Saving] = []
    before = timed(lambda: saving.append(begin(run, copies)))
    beside = list(while_under_way(saving[0], step, steps))
    waited = timed(lambda: saving[0].written.exception())
    after = timed(lambda: finish_checkpoint(saving[0], Retention(last=1)))
    stall = {clock: before[clock] + waited[clock] + after[clock] for clock in before}
    return {"stall": stall, "copy": before, "waited": waited, "steps": beside, "writing_s": saving[0].seconds}


def while_under_way(saving: Saving, step: Callable[[], None], steps: int) -> Iterator[dict[str, float]]:
    """Steps that end before the files are written, at most so many; as in a run, all ranks ask after each."""
    for _ in range(steps):
        found = timed(step)
        if not saving.is_under_way():
            return
        yield found


def begin(run: Run, copies: HostCopies | None) -> Saving:
    """Take a checkpoint of the run as it stands."""
    shutil.rmtree(run.folder.checkpoints / f"step-{run.state.step:06d}", ignore_errors=True)
    parts: dict[str, Any] = {"policy": run.policy, "reference": run.reference, "meter": run.meter}
    record = run.saver.record | {"evaluation": {}}
    return begin_checkpoint(run.folder.checkpoints, run.state, **parts, record=record, copies=copies)


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """How long it takes, all ranks starting together; `cpu_s` is the CPU time of the training thread alone."""
    barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    function()
    synchronize()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.thread_time() - cpu}


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
