"""Going on with a run that was stopped, killed or lost: what is checked first, and what is put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsdpo.console import say
from dsdpo.distributed import all_or_none, rank
from dsdpo.engine.zero_config import stage
from dsdpo.errors import ConfigError
from dsdpo.reference.base import Reference
from dsdpo.run.identity import record_identity
from dsdpo.run.plan import Plan
from dsdpo.training.checkpoint import TrainState, load_checkpoint, save_checkpoint, writing
from dsdpo.training.metrics import Meter
from dsdpo.training.pruning import Keep
from dsdpo.training.resume import check_identity, check_settings, find_checkpoint
from dsdpo.training.tracking import Tracker, drop_rows_after


def checkpoint_to_resume(plan: Plan) -> Path | None:
    """The checkpoint that this run goes on from, or None to start; what has changed since is said. Collective.

    Raises `CheckpointError` where the run would not be the same, before any model loads.
    """
    run = plan.run
    path, skipped = find_checkpoint(run)
    for line in skipped:
        say(line)
    if path is None:
        finished = Path(run.output_dir) / "model"
        if run.checkpoint.resume and finished.exists() and not run.overwrite_output_dir:
            raise ConfigError(
                f"checkpoint.resume: {run.output_dir} holds a finished run without checkpoints; choose another "
                "output_dir, or add --overwrite_output_dir true to replace it"
            )
        return None
    for line in check_settings(path, run, stage=stage(plan.policy_config), data=plan.train.pairs.digest):
        say(f"changed since {path.name}: {line}")
    return path


def checkpoint_record(plan: Plan) -> dict[str, Any]:
    """What a checkpoint says of the run, for `checkpoint_to_resume` to compare."""
    return {
        "settings": plan.run.model_dump(mode="json"),
        "data": plan.train.pairs.digest,
        "stage": stage(plan.policy_config),
    }


def save(plan: Plan, folder: Path, state: TrainState, *, tracker: Tracker, **parts: Any) -> None:
    """Write a checkpoint of the run as it stands, and delete those that are no longer kept. Collective.

    `parts` are `save_checkpoint`'s. Raises `CheckpointError`.
    """
    settings, checkpoints = plan.run.checkpoint, folder / "checkpoints"
    with all_or_none(), writing(checkpoints):
        tracker.sync()
    keep = Keep(last=settings.keep_last, best=settings.keep_best, metric=settings.best_metric)
    record = checkpoint_record(plan) | {"evaluation": tracker.evaluation_of(state.step)}
    save_checkpoint(checkpoints, state, record=record, keep=keep, **parts)


def begin(
    checkpoint: Path | None, plan: Plan, folder: Path, *, policy: Any, reference: Reference, meter: Meter
) -> tuple[TrainState, dict[str, Any]]:
    """Where training starts, with everything that the checkpoint holds put back; and the reference's identity.

    Rows of later steps leave `metrics.jsonl`. Raises `CheckpointError` for another reference than the checkpoint's,
    unless `checkpoint.allow_other_reference` permits it, which is then recorded. Collective.
    """
    if checkpoint is None:
        return TrainState(), record_identity(reference, folder, overridden=[])
    others = []
    if reference.identity is not None:
        others = check_identity(checkpoint, reference.identity, allow=plan.run.checkpoint.allow_other_reference)
    for line in others:
        say(f"another reference than {checkpoint.name}'s, as checkpoint.allow_other_reference permits: {line}")
    seed = plan.run.train.seed
    state = load_checkpoint(checkpoint, policy=policy, reference=reference, meter=meter, seed=seed)
    with all_or_none():
        if rank() == 0:
            drop_rows_after(folder, state.step)
    say(f"resumed from {checkpoint}: step {state.step} of {plan.total_steps}")
    return state, record_identity(reference, folder, overridden=others)
