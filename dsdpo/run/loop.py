"""The loop: score a step's pairs with the reference, train on them, then whatever is due after the step."""

from __future__ import annotations

from contextlib import closing

from dsdpo.console import counted
from dsdpo.data.steps import StepBatches
from dsdpo.distributed import rank
from dsdpo.engine.build import device
from dsdpo.objective.logps import PairLogps
from dsdpo.run.run import Run
from dsdpo.training.cadence import Progress, say_above_bar
from dsdpo.training.evaluate import evaluate
from dsdpo.training.patience import note_evaluation, out_of_patience
from dsdpo.training.samples import lengths
from dsdpo.training.step import train_step


def train_until_done(run: Run) -> str | None:
    """Take the run's optimizer steps from where its state stands; why it stopped early, if it did. Collective.

    A run that stops early is saved first. `run.state` is left behind the last step.
    """
    perf, state, due, reference = run.perf, run.state, run.due, run.reference
    settings = run.plan.run
    if out_of_patience(settings, state.means):
        return None
    windows = run.plan.training_windows(device(), state.step)
    with Progress(state.step, due.total_steps) as progress, closing(windows), run.profiler:
        run.profiler.after_step(state.step)
        steps = reference.along(perf.each("data", windows), after=state.step, phase=perf.phase)
        for window, anchor in steps:
            learning_rate = run.policy.get_lr()[0]
            taken = take_step(run, window, anchor)
            if due.sample(state.step):
                log_samples(run)
            # At a sync the reference becomes what the policy is, or comes near it: held-out pairs are scored before.
            held_out = held_out_metrics(run) if due.evaluate(state.step) and reference.moves_after(state.step) else {}
            with perf.phase("sync"):
                reference.after_step(state.step)
            if due.log(state.step):
                with perf.phase("log"):
                    metrics = log_step(run, window, learning_rate=learning_rate, taken=taken)
                progress.show(metrics)
                run.callbacks.call("step", run.folder, state.step, due.total_steps, metrics)
            progress.advance()
            if due.evaluate(state.step):
                log_evaluation(run, held_out or held_out_metrics(run))
            with perf.phase("other"):
                saving = run.saver.in_flight is not None
                reason = run.stop.reason(saving=saving) if state.step < due.total_steps else None
            ended = reason is not None or out_of_patience(settings, state.means)
            save(run, ended=ended)
            run.profiler.after_step(state.step)
            if ended:
                return reason
    return None


def save(run: Run, *, ended: bool) -> None:
    """Save the run if that is due, or if it has `ended`; tell of checkpoints that are whole now. Collective."""
    saver, step, total_steps = run.saver, run.state.step, run.due.total_steps
    if run.due.checkpoint(step) or saver.owed(step) or ended:
        with run.perf.phase("save"):
            saver.save(last=ended or step == total_steps)
        run.stop.waited()
    elif saver.in_flight is not None:
        with run.perf.phase("save"):
            saver.look()
    for saved in saver.take_named():
        if warning := run.stop.saved(saved.seconds):
            say_above_bar(warning)
        run.callbacks.call("save", run.folder, saved.step, total_steps, saved.evaluation, checkpoint=saved.path)


def take_step(run: Run, window: StepBatches, anchor: list[PairLogps]) -> bool:
    """Train on one step's pairs and move the run's state on; whether the weights were changed. Collective."""
    counted, means = run.meter.state(), dict(run.state.means)
    run.state.step += 1
    run.state.consumed_pairs += window.pairs
    outputs = train_step(
        run.policy,
        anchor,
        run.loss,
        window,
        run.meter,
        step=run.state.step,
        groups=run.groups,
        phase=run.perf.phase,
    )
    taken = run.policy.was_step_applied()
    if taken:
        run.loss.taken(window, outputs)
    else:
        run.meter.restore(counted)
        run.state.means.clear()
        run.state.means.update(means)
    if (wrong := run.nonfinite.note(run.state.step, window, outputs, taken=taken)) is not None:
        run.tracker.alert("Step skipped", wrong)
    run.tracker.log_pairs(run.state.step, window.pair_ids)
    run.perf.count(window)
    return taken


def log_step(run: Run, window: StepBatches, *, learning_rate: float, taken: bool) -> dict[str, float]:
    """Write the metrics row of the steps since the last one; the row. Collective."""
    metrics = run.perf.read(run.meter)
    if taken:
        metrics["grad_norm"] = float(run.policy.get_global_grad_norm() or 0.0)
    metrics |= {"learning_rate": learning_rate, "train/skipped_steps": run.policy.skipped_steps}
    metrics |= {"epoch": window.epoch, **run.loss.metrics(run.state.step), **run.reference.metrics()}
    run.tracker.log(run.state.step, metrics)
    if run.plan.run.tracking.hints:
        for line in run.hints.of_row(run.state.step, metrics):
            say_above_bar(line)
    return metrics


def evaluate_at_start(run: Run) -> None:
    """Score the held-out pairs before the first step of a run that is not resumed, if it asks for that. Collective.

    What the training pairs suggest is said first. Raises `StoppedError` if the run is asked to stop meanwhile: nothing
    has been trained that would have to be saved.
    """
    if run.plan.run.tracking.hints and rank() == 0:
        for line in run.hints.of_data(run.plan.train.pairs):
            say_above_bar(line)
    if run.state.step == 0 and run.due.evaluate(0):
        log_evaluation(run, held_out_metrics(run, may_stop=True))
    run.stop.check_signals()
    if run.state.step == 0 and run.due.sample(0):
        log_samples(run)
    run.stop.check_signals()


def held_out_metrics(run: Run, *, may_stop: bool = False) -> dict[str, float]:
    """The held-out metrics under policy and reference as they are; nothing without held-out pairs. Collective."""
    if run.plan.evaluation is None:
        return {}
    windows = run.plan.held_out_windows(device())
    with run.perf.phase("evaluate"):
        windows = run.stop.between(windows) if may_stop else windows
        return evaluate(
            run.policy, run.reference, run.loss, windows, step=max(1, run.state.step), held_out=run.held_out
        )


def log_evaluation(run: Run, metrics: dict[str, float]) -> None:
    """Write the row of an evaluation, if there was one, and say it in a line."""
    if not metrics:
        return
    run.tracker.log(run.state.step, metrics)
    say_above_bar(evaluation_line(run.state.step, metrics))
    note_evaluation(run.plan.run, run.state.means, metrics)
    run.callbacks.call("evaluate", run.folder, run.state.step, run.due.total_steps, metrics)


def log_samples(run: Run) -> None:
    """Have policy and reference answer the run's prompts, and write down what they say. Collective."""
    assert run.sampler is not None
    with run.perf.phase("samples"):
        rows = run.sampler.rows(run.policy, run.reference, step=run.state.step)
    found = lengths(rows)
    run.tracker.log_samples(run.state.step, rows)
    run.tracker.log(run.state.step, found)
    say_above_bar(
        f"samples after step {run.state.step}: {counted(len(rows), 'answer')} of "
        f"{found['samples/policy_tokens']:.0f} tokens on average, {found['samples/policy_ended']:.0%} ended, "
        f"in {run.folder.samples}"
    )


def evaluation_line(step: int, metrics: dict[str, float]) -> str:
    """An evaluation in a line."""
    shown = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "nll/chosen": "nll"}
    figures = [f"{short} {metrics[f'eval/{name}']:.4f}" for name, short in shown.items() if f"eval/{name}" in metrics]
    return f"step {step}: held-out {', '.join(figures)}"
