"""One object that owns everything of a run, from its plan to its counters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsdpo.engine.types import TrainingEngine
from dsdpo.objective.losses import LossFn, make_loss
from dsdpo.reference.base import Reference
from dsdpo.run.models import build_policy_and_reference
from dsdpo.run.plan import Plan
from dsdpo.run.resume import checkpoint_record, restore_or_start, resumed_plan, state_of
from dsdpo.run_folder import RunFolder
from dsdpo.training.cadence import Cadence
from dsdpo.training.checkpoint import TrainState
from dsdpo.training.metrics import Meter
from dsdpo.training.nonfinite import NonfiniteSteps
from dsdpo.training.perf import Perf, perf_of
from dsdpo.training.saver import Saver
from dsdpo.training.stop import StopRequest
from dsdpo.training.tracking import Tracker


@dataclass(frozen=True)
class Run:
    """A run with its engines built, ready to take its next step. Functions take it; it has none of its own."""

    plan: Plan
    folder: RunFolder
    policy: TrainingEngine
    reference: Reference
    loss_fn: LossFn
    state: TrainState  # moves on with every step
    due: Cadence
    meter: Meter
    perf: Perf
    nonfinite: NonfiniteSteps
    tracker: Tracker
    saver: Saver
    stop: StopRequest


def build_run(plan: Plan, folder: RunFolder, checkpoint: Path | None, stop: StopRequest) -> Run:
    """Both engines and all that goes with them, as they were at `checkpoint`, or at the start. Collective.

    Raises `StoppedError` if the run is asked to stop meanwhile.
    """
    settings, meter, state = plan.run, Meter(), state_of(checkpoint)
    plan = resumed_plan(plan, state)
    policy, reference = build_policy_and_reference(plan)
    identity = restore_or_start(checkpoint, plan, folder, policy=policy, reference=reference, meter=meter)
    tracker = Tracker(settings, folder, facts={"reference_identity": identity})
    return Run(
        plan=plan,
        folder=folder,
        policy=policy,
        reference=reference,
        loss_fn=make_loss(settings.loss),
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
        ),
        stop=stop,
    )
