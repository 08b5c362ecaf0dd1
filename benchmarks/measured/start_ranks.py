"""Inside the processes of `benchmarks.start`: a run up to its first step, its loading done in one of two ways.

python -m benchmarks.measured.start_ranks own-parts|transformers RUN.yaml      (or under the deepspeed launcher)
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Any

from benchmarks.harness.recorder import Recorder
from dsdpo import Event, Run, train
from dsdpo.engine import build, load


def main(way: str, run_file: str) -> None:
    """Train one step; what loading the policy and the reference took is noted."""
    recorder = Recorder()
    recorder.note("launcher and imports", time.time() - recorder.started_at)
    if way == "transformers":
        load.loading_own_shards = lambda like: nullcontext()  # type: ignore[assignment]
    load_lm, names = build.load_lm, iter(("policy", "reference"))

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        lm = load_lm(*arguments, **options)
        recorder.note(next(names), time.perf_counter() - started)
        return lm

    build.load_lm = timed

    def report(event: Event) -> None:
        recorder.loss(event.metrics["loss"])
        recorder.step()

    train(Run(run_file), on_step=report, callbacks_on_all_ranks=True, quiet=False)


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
