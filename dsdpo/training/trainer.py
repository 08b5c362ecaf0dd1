"""The loop: score a window with the reference, train on it, then whatever is due after the step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from dsdpo.config.run import RunConfig
from dsdpo.data.window import Window
from dsdpo.distributed import rank, world_size
from dsdpo.objective.logps import pair_logps
from dsdpo.objective.losses import LossFn
from dsdpo.reference.base import Reference
from dsdpo.training.checkpoint import TrainState
from dsdpo.training.metrics import Meter, pair_metrics
from dsdpo.training.tracking import Tracker


@dataclass(frozen=True)
class Due:
    """After which steps something happens; step 0 is the start."""

    total_steps: int
    log_every: int
    evaluate_every: int  # 0: only at the end
    evaluate_at_start: bool
    checkpoint_every: int  # 0: never

    @classmethod
    def of(cls, run: RunConfig, total_steps: int) -> Due:
        """As the run says."""
        return cls(
            total_steps=total_steps,
            log_every=run.tracking.every_steps,
            evaluate_every=run.evaluation.every_steps,
            evaluate_at_start=run.evaluation.at_start,
            checkpoint_every=run.checkpoint.every_steps,
        )

    def log(self, step: int) -> bool:
        return step == 1 or step % self.log_every == 0 or step == self.total_steps

    def evaluate(self, step: int) -> bool:
        if step == 0:
            return self.evaluate_at_start
        return step == self.total_steps or bool(self.evaluate_every and step % self.evaluate_every == 0)

    def checkpoint(self, step: int) -> bool:
        return bool(self.checkpoint_every) and (step % self.checkpoint_every == 0 or step == self.total_steps)


def train(
    policy: Any,
    reference: Reference,
    loss_fn: LossFn,
    windows: Iterable[Window],
    *,
    state: TrainState,
    due: Due,
    tracker: Tracker,
    meter: Meter,
    evaluate: Callable[[], None],
    save: Callable[[], None],
    stop: Callable[[], str | None],
) -> str | None:
    """Run optimizer steps until `windows` ends or `stop` gives a reason, which is returned. Collective.

    `policy` is a DeepSpeed engine around a `ResponseScorer`; `evaluate` and `save` are called when due, and `save` also
    before stopping. `state` is left behind the last step.
    """
    speed = Speed()
    with Progress(state.step, due.total_steps) as progress:
        for window in windows:
            learning_rate = policy.get_lr()[0]
            train_step(policy, reference, loss_fn, window, meter)
            state.step += 1
            state.consumed_pairs += window.pairs
            reference.after_step(state.step)
            speed.count(window)
            if due.log(state.step):
                metrics = meter.read()
                metrics |= {"grad_norm": float(policy.get_global_grad_norm() or 0.0), "learning_rate": learning_rate}
                metrics |= {"epoch": window.epoch, **speed.read(), **reference.metrics()}
                tracker.log(state.step, metrics)
                progress.show(metrics)
            progress.advance()
            if due.evaluate(state.step):
                with speed.paused():
                    evaluate()
            reason = stop() if state.step < due.total_steps else None
            if due.checkpoint(state.step) or reason:
                with speed.paused():
                    save()
            if reason:
                return reason
    return None


def train_step(policy: Any, reference: Reference, loss_fn: LossFn, window: Window, meter: Meter) -> None:
    """One optimizer update on the mean loss of the window's pairs, however they are batched. Collective."""
    # DeepSpeed averages gradients over ranks; each rank contributes the sum over its own share of the pairs.
    scale = world_size() / window.pairs
    for batch, reference_logps in zip(window.batches, reference.score(window.batches), strict=True):
        policy_logps = pair_logps(policy, batch)
        output = loss_fn(policy_logps, reference_logps)
        weight = (batch.pair_ids >= 0).to(output.losses.dtype)
        policy.backward((output.losses * weight).sum() * scale, scale_wrt_gas=False)
        meter.add(pair_metrics(output, policy_logps, reference_logps), weight)
    policy.step()


class Speed:
    """Throughput of all ranks together since the last reading, evaluation and saving left out."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._steps = self._pairs = self._tokens = 0

    def count(self, window: Window) -> None:
        """Take note of a finished step."""
        self._steps += 1
        self._pairs += window.pairs
        self._tokens += window.tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        entered = time.perf_counter()
        yield
        self._started += time.perf_counter() - entered

    def read(self) -> dict[str, float]:
        """`perf/...` and `time/...` metrics, and start again."""
        seconds = time.perf_counter() - self._started
        metrics = {
            "perf/pairs_per_s": self._pairs / seconds,
            "perf/tokens_per_s": self._tokens / seconds,
            "time/step_s": seconds / max(1, self._steps),
        }
        self._restart()
        return metrics


class Progress:
    """One bar on rank 0: steps, ETA, loss, accuracy, margin and pairs/s."""

    def __init__(self, done: int, total: int) -> None:
        self._bar = tqdm(
            desc="train",
            total=total,
            initial=done,
            unit="step",
            disable=rank() != 0,
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
        """Put the latest metrics behind the bar."""
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, accuracy {metrics['rewards/accuracies']:.2f}, "
            f"margin {metrics['rewards/margins']:.3f}, {metrics['perf/pairs_per_s']:.1f} pairs/s",
            refresh=False,
        )
