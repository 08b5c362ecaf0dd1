"""A measured `dsdpo train`: the run as it is, with the end of each step reported to the recorder by a callback.

python -m benchmarks.measured.ours RUN.yaml                                    (or under the deepspeed launcher)
"""

from __future__ import annotations

import sys

from benchmarks.harness.recorder import Recorder
from dsdpo import Event, Run, train


def main(run_file: str) -> None:
    """Train."""
    recorder = Recorder()

    def report(event: Event) -> None:
        recorder.loss(event.metrics.get("loss", float("nan")))  # a skipped step has none
        for name, value in event.metrics.items():
            if name.startswith(("time/", "perf/", "memory/", "reference/")):
                recorder.note(name, value)
        recorder.step()

    train(Run(run_file), on_step=report, callbacks_on_all_ranks=True, quiet=False)


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
