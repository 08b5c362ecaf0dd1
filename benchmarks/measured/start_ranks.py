"""Inside the processes of `benchmarks.start`: a run up to its first step, its loading done in one of two ways.

python -m benchmarks.measured.start_ranks own-parts|transformers RUN.yaml      (or under the deepspeed launcher)
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import nullcontext

from benchmarks.harness.recorder import Recorder
from dsdpo import Event, Run, train
from dsdpo.engine import load


class Said(logging.Handler):
    """What the run logs of how long its parts took: their words, seconds, and when each was over."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[str, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 2 and isinstance(record.args[1], float):
            self.parts.append((str(record.args[0]), record.args[1], record.created))

    def find(self, words: str, number: int = 0) -> tuple[float, float]:
        """Seconds, and when it was over, of the part that begins with these words."""
        return [(seconds, over) for what, seconds, over in self.parts if what.startswith(words)][number]


def main(way: str, run_file: str) -> None:
    """Train one step; how long each part of the start took is noted."""
    recorder, said = Recorder(), Said()
    begun = time.time()
    recorder.note("launcher and imports", begun - recorder.started_at)
    if way == "transformers":
        load.loading_own_shards = lambda like: nullcontext()  # type: ignore[assignment]
    for name in ("dsdpo.console", "dsdpo.engine.load"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(said)

    def report(event: Event) -> None:
        for part, seconds in parts_of(said, begun).items():
            recorder.note(part, seconds)
        recorder.loss(event.metrics["loss"])
        recorder.step()

    train(Run(run_file), on_step=report, callbacks_on_all_ranks=True, quiet=False)


def parts_of(said: Said, begun: float) -> dict[str, float]:
    """Seconds of each part of the start from the imports on, up to now."""
    policy, loaded = said.find("loading the policy")
    reference, ready = said.find("loading the reference")
    weights = [said.find("weights of", number)[0] for number in (0, 1)]
    return {
        "settings, process group, data": loaded - policy - begun,
        "policy: weights": weights[0],
        "policy: engine and optimizer": policy - weights[0],
        "a first pass over the longest pairs": said.find("a first pass")[0],
        "the policy's log-probs checked": said.find("checking log-probs")[0],
        "reference: weights": weights[1],
        "reference: engine and its check": reference - weights[1],
        "the first step": time.time() - ready,
    }


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
