"""Going on with a run that was stopped, killed or lost: what is checked first, and what is put back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dsdpo.atomic import write_json
from dsdpo.console import say
from dsdpo.data.plan import remaining_steps
from dsdpo.distributed import all_or_none, rank
from dsdpo.engine.optimizer_limits import optimizer_kind
from dsdpo.engine.quirks.repartition import cut, why_fixed
from dsdpo.engine.types import TrainingEngine
from dsdpo.engine.zero_config import stage
from dsdpo.errors import ConfigError
from dsdpo.reference.base import Reference
from dsdpo.reference.identity import ReferenceIdentity
from dsdpo.reference.store import read_identity
from dsdpo.run.plan import Plan, with_total_steps
from dsdpo.run_folder import RunFolder
from dsdpo.training.checkpoint import TrainState, load_checkpoint, read_state
from dsdpo.training.metrics import Meter
from dsdpo.training.resume import check_identity, check_settings, find_checkpoint
from dsdpo.training.tracking import drop_rows_after


def checkpoint_to_resume(plan: Plan) -> Path | None:
    """The checkpoint that this run goes on from, or None to start; what has changed since is said. Collective.

    Raises `CheckpointError` where the run would not be the same, before any model loads.
    """
    run = plan.run
    path, skipped = find_checkpoint(run)
    for line in skipped:
        say(line)
    if path is None:
        finished = RunFolder(run.output_dir).model
        if run.checkpoint.resume and finished.exists() and not run.overwrite_output_dir:
            raise ConfigError(
                f"checkpoint.resume: {run.output_dir} holds a finished run without checkpoints; choose another "
                "output_dir, or add --overwrite_output_dir true to replace it"
            )
        return None
    for line in check_settings(path, run, config=plan.policy_config, data=plan.train.pairs.digest):
        say(f"changed since {path.name}: {line}")
    return path


def checkpoint_record(plan: Plan) -> dict[str, Any]:
    """What a checkpoint says of the run, for `checkpoint_to_resume` to compare."""
    return {
        "settings": plan.run.model_dump(mode="json"),
        "data": plan.train.pairs.digest,
        "total_steps": plan.total_steps,
        "stage": stage(plan.policy_config),
        "optimizer": optimizer_kind(plan.policy_config),
        "partitions": cut(plan.policy_config),
        "fixed": why_fixed(plan.policy_config),
    }


def resumed_plan(plan: Plan, state: TrainState) -> Plan:
    """The plan of what is left from there on.

    The position in the data is the number of pairs trained on; how many steps are left follows from that and from
    today's `batch.pairs_per_step`, which may be another than before.
    """
    train, num_pairs, total = plan.run.train, len(plan.train.pairs), plan.total_steps
    if train.max_steps < 0:
        left = remaining_steps(
            round(train.num_train_epochs * num_pairs),
            start=state.consumed_pairs,
            num_pairs=num_pairs,
            pairs_per_step=plan.run.batch.pairs_per_step,
        )
        total = max(1, state.step + left)
    return replace(with_total_steps(plan, total), start_step=state.step, start_pairs=state.consumed_pairs)


def state_of(checkpoint: Path | None) -> TrainState:
    """How far a run was at a checkpoint; the start without one."""
    if checkpoint is None:
        return TrainState()
    progress = read_state(checkpoint)
    return TrainState(step=progress["step"], consumed_pairs=progress["consumed_pairs"], means=progress.get("means", {}))


def restore_or_start(
    checkpoint: Path | None,
    plan: Plan,
    folder: RunFolder,
    *,
    policy: TrainingEngine,
    reference: Reference,
    meter: Meter,
) -> dict[str, Any]:
    """Put back everything that the checkpoint holds, if there is one; the reference's identity as JSON. Collective.

    Rows of later steps leave `metrics.jsonl`. Raises `CheckpointError` for another reference than the checkpoint's,
    unless `checkpoint.allow_other_reference` permits it, which is then recorded.
    """
    if checkpoint is None:
        return record_identity(reference.identity, folder, overridden=[])
    others = []
    if reference.identity is not None:
        others = check_identity(checkpoint, reference.identity, allow=plan.run.checkpoint.allow_other_reference)
        reference.identity = with_first_bias(reference.identity, checkpoint)
    for line in others:
        say(f"another reference than {checkpoint.name}'s, as checkpoint.allow_other_reference permits: {line}")
    seed = plan.run.train.seed
    state = load_checkpoint(checkpoint, policy=policy, reference=reference, meter=meter, seed=seed)
    with all_or_none():
        if rank() == 0:
            drop_rows_after(folder, state.step)
    say(f"resumed from {checkpoint}: step {state.step} of {plan.total_steps}")
    return record_identity(reference.identity, folder, overridden=others)


def with_first_bias(identity: ReferenceIdentity, checkpoint: Path) -> ReferenceIdentity:
    """The identity with the bias that was measured when training began; another one today is said."""
    saved = read_identity(checkpoint)
    if saved is None or saved.bias is None or identity.bias is None:
        return identity
    if (line := identity.drift(saved)) is not None:
        say(line)
    return replace(identity, bias=saved.bias)


def record_identity(identity: ReferenceIdentity | None, folder: RunFolder, *, overridden: list[str]) -> dict[str, Any]:
    """Say which reference this is, write it into the run folder, and return it as JSON. Collective.

    Without a reference nothing is written, and the answer is empty.
    `overridden` says in what it is not the one that training began with.
    """
    if identity is None:
        return {}
    say(f"reference: {identity.describe()}")
    content = identity.to_json() | ({"overridden": overridden} if overridden else {})
    with all_or_none():
        if rank() == 0:
            write_json(folder.identity, content)
    return content
