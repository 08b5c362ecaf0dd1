"""One object that owns everything of a run, from its plan to its counters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsdpo.disks import find_disk
from dsdpo.distributed import rank
from dsdpo.engine.build import device
from dsdpo.engine.types import TrainingEngine
from dsdpo.reference.base import Reference
from dsdpo.run.background import host_copies
from dsdpo.run.finite_weights import check_start
from dsdpo.run.models import build_policy_and_reference
from dsdpo.run.plan import Plan
from dsdpo.run.resume import checkpoint_record, restore_or_start, resumed_plan, state_of
from dsdpo.run.tracked import expected, facts, inspected_rows
from dsdpo.run_folder import RunFolder
from dsdpo.stop_request import StopRequest
from dsdpo.training.cadence import Cadence
from dsdpo.training.callbacks import Callbacks
from dsdpo.training.checkpoint import TrainState
from dsdpo.training.evaluate import HeldOut
from dsdpo.training.groups import DeviceGroups, groupings
from dsdpo.training.hints import Hints
from dsdpo.training.metrics import Meter
from dsdpo.training.nonfinite import NonfiniteSteps
from dsdpo.training.perf import Perf, perf_of
from dsdpo.training.profiler import StepProfiler
from dsdpo.training.samples import Sampler
from dsdpo.training.saver import Saver
from dsdpo.training.step_loss import StepLoss
from dsdpo.training.tracking import Tracker


@dataclass(frozen=True)
class Run:
    """A run with its engines built, ready to take its next step. Functions take it; it has none of its own."""

    plan: Plan
    folder: RunFolder
    policy: TrainingEngine
    reference: Reference
    loss: StepLoss
    groups: DeviceGroups  # of training pairs
    held_out: HeldOut
    sampler: Sampler | None  # None: no samples are asked for
    hints: Hints
    state: TrainState  # moves on with every step
    due: Cadence
    meter: Meter
    perf: Perf
    nonfinite: NonfiniteSteps
    tracker: Tracker
    saver: Saver
    stop: StopRequest
    profiler: StepProfiler
    callbacks: Callbacks


def build_run(
    plan: Plan, folder: RunFolder, checkpoint: Path | None, stop: StopRequest, callbacks: Callbacks | None = None
) -> Run:
    """Both engines and all that goes with them, as they were at `checkpoint`, or at the start. Collective.

    Raises `StoppedError` if the run is asked to stop meanwhile.
    """
    settings, state = plan.run, state_of(checkpoint)
    meter = Meter(top_k=plan.routing.top_k if plan.routing else 1)
    plan = resumed_plan(plan, state)
    stop.check_signals()
    estimate = expected(plan)
    policy, reference = build_policy_and_reference(plan)
    stop.check_signals()
    identity = restore_or_start(checkpoint, plan, folder, policy=policy, reference=reference, meter=meter)
    check_start(plan, policy, reference, checkpoint)
    tracker = Tracker(settings, folder, facts=facts(plan, policy, identity, estimate), start_step=state.step)
    if settings.tracking.inspected_rows and rank() == 0:
        tracker.log_rows("inspected_rows", state.step, inspected_rows(plan))
    return Run(
        plan=plan,
        folder=folder,
        policy=policy,
        reference=reference,
        loss=StepLoss(
            settings.loss,
            total_steps=plan.total_steps,
            means=state.means,
            score_tokens=settings.reference.score_tokens * plan.sequence.size,
            entropy=settings.tracking.entropy,
            routing=plan.routing,
        ),
        groups=groups_of(plan),
        held_out=held_out_of(plan),
        sampler=sampler_of(plan),
        hints=Hints(settings.loss, said=state.means),
        state=state,
        due=Cadence.of(settings, plan.total_steps),
        meter=meter,
        perf=perf_of(settings, policy, reference),
        nonfinite=NonfiniteSteps(settings, folder),
        tracker=tracker,
        saver=Saver(
            settings.checkpoint,
            folder.checkpoints,
            state=state,
            policy=policy,
            reference=reference,
            meter=meter,
            tracker=tracker,
            record=checkpoint_record(plan),
            disk=find_disk(folder.path, key="output_dir"),
            copies=host_copies(plan, policy),
        ),
        stop=stop,
        profiler=StepProfiler(settings.tracking.profile_steps, folder.profile),
        callbacks=callbacks or Callbacks(),
    )


def groups_of(plan: Plan) -> DeviceGroups:
    """Which training pairs metrics are given apart for."""
    settings, pairs = plan.run, plan.train.pairs
    found = groupings(pairs, settings.data.train, settings.evaluation.length_buckets)
    return DeviceGroups(found, device=device(), first_pair_id=plan.train.first_pair_id)


def held_out_of(plan: Plan) -> HeldOut:
    """How the held-out pairs are evaluated: which ones apart, and whether the reference is asked anew each time."""
    source, settings = plan.evaluation, plan.run
    if source is None:
        return HeldOut()
    return HeldOut(
        groupings=groupings(source.pairs, settings.data.eval or (), settings.evaluation.length_buckets),
        first_pair_id=source.first_pair_id,
        counts=plan.sequence.counts,
        reference_is_static=plan.reference.sync is None,
    )


def sampler_of(plan: Plan) -> Sampler | None:
    """What answers the run's fixed prompts, if it has any."""
    settings = plan.run.evaluation.samples
    if settings is None:
        return None
    still = plan.reference.sync is None
    return Sampler(plan.prompts, settings, plan.tokenizer, seed=plan.run.train.seed, reference_is_static=still)
