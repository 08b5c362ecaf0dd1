"""A measured `dsdpo train`: the command itself, with the end of each step reported to the recorder.

python -m benchmarks.ours RUN.yaml                                    (or under the deepspeed launcher)
"""

from __future__ import annotations

import sys

from benchmarks.recorder import Recorder
from dsdpo.commands import arguments, train
from dsdpo.training.tracking import Tracker


def main(argv: list[str]) -> int:
    """Train; the exit code."""
    recorder = Recorder()
    log = Tracker.log

    def log_and_report(self: Tracker, step: int, metrics: dict[str, float]) -> None:
        # Called on every rank at the end of every step, as the run logs every step and never evaluates.
        log(self, step, metrics)
        recorder.loss(metrics.get("loss", float("nan")))  # a skipped step has none
        for name, value in metrics.items():
            if name.startswith(("time/", "perf/", "memory/", "reference/")):
                recorder.note(name, value)
        recorder.step()

    Tracker.log = log_and_report  # type: ignore[method-assign]
    return train.main(arguments.train(argv))


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
