"""After which steps of a run something is due, and the bar that shows how far it is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

from dsdpo.config.run import RunConfig
from dsdpo.console import is_quiet, wrapped
from dsdpo.distributed import rank

COLUMNS = 80  # of the narrowest terminal that shows a whole line


@dataclass(frozen=True)
class Cadence:
    """After which steps something happens; step 0 is the start."""

    total_steps: int
    log_every: int
    evaluate_every: int  # 0: only at the end
    evaluate_at_start: bool
    checkpoint_every: int  # 0: never
    sample_every: int | None = None  # 0: only at the start and the end; None: never

    @classmethod
    def of(cls, run: RunConfig, total_steps: int) -> Cadence:
        """As the run says."""
        samples, sample_every = run.evaluation.samples, None
        if samples is not None:
            sample_every = run.evaluation.every_steps if samples.every_steps is None else samples.every_steps
        return cls(
            total_steps=total_steps,
            log_every=run.tracking.every_steps,
            evaluate_every=run.evaluation.every_steps,
            evaluate_at_start=run.evaluation.at_start,
            checkpoint_every=run.checkpoint.every_steps,
            sample_every=sample_every,
        )

    def log(self, step: int) -> bool:
        return step == 1 or step % self.log_every == 0 or step == self.total_steps

    def evaluate(self, step: int) -> bool:
        return self._now_and_then(step, self.evaluate_every)

    def sample(self, step: int) -> bool:
        return self.sample_every is not None and self._now_and_then(step, self.sample_every)

    def _now_and_then(self, step: int, every: int) -> bool:
        if step == 0:
            return self.evaluate_at_start
        return step == self.total_steps or bool(every and step % every == 0)

    def checkpoint(self, step: int) -> bool:
        return bool(self.checkpoint_every) and (step % self.checkpoint_every == 0 or step == self.total_steps)


def say_above_bar(line: str) -> None:
    """Print on rank 0, above the bar if there is one."""
    if rank() != 0 or is_quiet():
        return
    if sys.stderr.isatty():
        tqdm.write(wrapped(line))
        sys.stdout.flush()
    else:  # where a bar is a line now and then, wiping it out would be a line of spaces
        print(line, flush=True)


class _Lines:
    """Where there is no terminal, each state of a bar as a line of its own, so that none runs into what comes next."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if state := text.strip():
            self._file.write(f"{state}\n")

    def flush(self) -> None:
        self._file.flush()


class Progress:
    """One bar on rank 0: steps, ETA, loss, accuracy, margin, pairs/s and MFU, as far as they fit into 80 columns."""

    def __init__(self, done: int, total: int) -> None:
        self._bar = tqdm(
            desc="train",
            file=sys.stderr if sys.stderr.isatty() else _Lines(sys.stderr),
            bar_format="{desc} {n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
            total=total,
            initial=done,
            unit="step",
            disable=rank() != 0 or is_quiet(),
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log file wants few lines
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One more step done."""
        self._bar.update()

    def show(self, metrics: dict[str, float]) -> None:
        """Put the latest metrics behind the bar, if any step was taken."""
        if "loss" not in metrics:
            return
        figures = [
            f"loss {metrics['loss']:.3f}",
            f"acc {metrics['rewards/accuracies']:.2f}",
            # Of rated completions there is none until both kinds have come.
            *([f"margin {metrics['rewards/margins']:.3f}"] if "rewards/margins" in metrics else ()),
            f"{metrics['perf/pairs_per_s']:.1f} pairs/s",
            *([f"{metrics['perf/mfu']:.0%} MFU"] if "perf/mfu" in metrics else ()),
        ]
        around = f"train {self._bar.total}/{self._bar.total} # 1:00:00<1:00:00, "
        while len(around + " ".join(figures)) > COLUMNS:
            figures.pop()  # the last matters least
        self._bar.set_postfix_str(" ".join(figures), refresh=False)
