"""The loop: score a window with the reference, train on it, then whatever is due after the step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from dsdpo.data.steps import StepBatches
from dsdpo.distributed import rank, world_size
from dsdpo.objective.logps import pair_logps
from dsdpo.objective.losses import LossFn, LossOutput
from dsdpo.reference.base import Reference
from dsdpo.training.cadence import Cadence
from dsdpo.training.checkpoint import TrainState
from dsdpo.training.metrics import Meter, pair_metrics
from dsdpo.training.nonfinite import marked
from dsdpo.training.perf import Perf, Phase, untimed
from dsdpo.training.saver import Saver
from dsdpo.training.tracking import Tracker


def train(
    policy: Any,
    reference: Reference,
    loss_fn: LossFn,
    windows: Iterable[StepBatches],
    *,
    state: TrainState,
    due: Cadence,
    tracker: Tracker,
    meter: Meter,
    perf: Perf,
    evaluate: Callable[[], None],
    save: Saver,
    skipped: Callable[[int, StepBatches, list[LossOutput]], None],
    stop: Callable[[], str | None],
) -> str | None:
    """Run optimizer steps until `windows` ends or `stop` gives a reason, which is returned. Collective.

    `policy` is a DeepSpeed engine around a `ResponseScorer`; `evaluate` and `save` are called when due, and `save` also
    before stopping. A step that could not be taken is handed to `skipped`. `state` is left behind the last step.
    """
    with Progress(state.step, due.total_steps) as progress:
        for window in perf.each("data", reference.looking_ahead(windows, state.step)):
            learning_rate = policy.get_lr()[0]
            counted = meter.state()
            outputs = train_step(policy, reference, loss_fn, window, meter, phase=perf.phase)
            taken = policy.was_step_applied()
            if not taken:
                meter.restore(counted)
                skipped(state.step + 1, window, outputs)
            state.step += 1
            state.consumed_pairs += window.pairs
            with perf.phase("sync"):
                reference.after_step(state.step)
            tracker.log_pairs(state.step, window.pair_ids)
            perf.count(window)
            if due.log(state.step):
                with perf.phase("log"):
                    metrics = perf.read(meter)
                    metrics |= {"grad_norm": float(policy.get_global_grad_norm() or 0.0)} if taken else {}
                    metrics |= {"learning_rate": learning_rate, "train/skipped_steps": policy.skipped_steps}
                    metrics |= {"epoch": window.epoch, **reference.metrics()}
                    tracker.log(state.step, metrics)
                progress.show(metrics)
            progress.advance()
            if due.evaluate(state.step):
                with perf.phase("evaluate"):
                    evaluate()
            with perf.phase("other"):
                reason = stop() if state.step < due.total_steps else None
            if due.checkpoint(state.step) or save.owed(state.step) or reason:
                with perf.phase("save"):
                    save(state.step, last=bool(reason) or state.step == due.total_steps)
            if reason:
                return reason
    return None


def train_step(
    policy: Any, reference: Reference, loss_fn: LossFn, window: StepBatches, meter: Meter, *, phase: Phase = untimed
) -> list[LossOutput]:
    """One optimizer update on the mean loss of the window's pairs, however they are batched. Collective.

    Returns what came out for this rank's micro-batches, detached. The update is left out on all ranks where a loss or
    gradient is not finite.
    """
    outputs = []
    # DeepSpeed averages gradients over ranks; each rank contributes the sum over its own share of the pairs.
    scale = world_size() / window.pairs
    with phase("reference"):
        answers = reference.score(window.batches)
    with phase("forward_backward"):
        for batch, reference_logps in zip(window.batches, answers, strict=True):
            policy_logps = pair_logps(policy, batch)
            output = loss_fn(policy_logps, reference_logps)
            weight = (batch.pair_ids >= 0).to(output.losses.dtype)
            policy.backward(marked((output.losses * weight).sum() * scale, output, weight), scale_wrt_gas=False)
            meter.add(pair_metrics(output, policy_logps, reference_logps), weight)
            outputs.append(replace(output, losses=output.losses.detach()))
    with phase("optimizer"):
        policy.step()
    return outputs


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
        """Put the latest metrics behind the bar, if any step was taken."""
        if "loss" not in metrics:
            return
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, accuracy {metrics['rewards/accuracies']:.2f}, "
            f"margin {metrics['rewards/margins']:.3f}, {metrics['perf/pairs_per_s']:.1f} pairs/s"
            + (f", {metrics['perf/mfu']:.0%} MFU" if "perf/mfu" in metrics else ""),
            refresh=False,
        )
