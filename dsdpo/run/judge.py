"""A trained or given policy beside its reference, on pairs of one's choice: what evaluation and scoring start from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dsdpo.config.data import SourceConfig
from dsdpo.config.reference import STRATEGIES
from dsdpo.config.reference_plan import ReferencePlan, plan_reference
from dsdpo.config.run import ModelConfig, RunConfig
from dsdpo.console import say
from dsdpo.distributed import gather_objects, local_rank, node, on_some_ranks
from dsdpo.engine.build import start_distributed
from dsdpo.errors import ConfigError
from dsdpo.run.finished import FinishedRun, last_step
from dsdpo.run.offline_export import export_checkpoint, model_of
from dsdpo.run.plan import Plan, plan_run
from dsdpo.run.saved import choose_checkpoint
from dsdpo.training.checkpoint import read_state, whole_checkpoints
from dsdpo.training.step_loss import StepLoss

KEPT = ("loss", "batch", "distributed", "deepspeed", "output_dir")  # sections that judging has a use for


@dataclass(frozen=True)
class Judged:
    """A policy and the reference that it is compared with."""

    run: RunConfig  # what they were trained by, or the defaults
    policy: ModelConfig
    reference: ModelConfig | None  # None: the loss has none
    name: str  # of the policy, for people
    step: int = 0  # optimizer steps that it has been trained for
    total_steps: int | None = None  # of its whole run; None: not known, taken for `step`
    means: dict[str, float] | None = None  # running means of its loss

    def loss(self, run: RunConfig) -> StepLoss:
        """The loss of `run` as training had it at that step: its beta and running means."""
        return StepLoss(
            run.loss,
            total_steps=self.total_steps or self.loss_step,
            means=dict(self.means or {}),
            score_tokens=run.reference.score_tokens,
            entropy=run.tracking.entropy,
        )

    @property
    def loss_step(self) -> int:
        """The step whose beta counts: the last one taken, or the first of a model that has taken none."""
        return max(1, self.step)


@contextmanager
def judged(run: RunConfig, finished: FinishedRun | None, *, checkpoint: str | None) -> Iterator[Judged]:
    """The policy of a run and its reference, as at the start of training. Collective.

    The policy is that of `checkpoint`, which is written to a folder for temporary files meanwhile; else the exported
    model, the newest checkpoint, or for a run that has neither the model that it would start from. Raises
    `CheckpointError` or `ConfigError`.
    """
    plan = plan_reference(run)
    reference = plan.model if plan.exists else None
    if plan.sync is not None and finished is not None:
        say("the reference is the one that training began with, before TR-DPO moved it")
    if finished is None:
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint {checkpoint}: {run.output_dir} is no folder of a run; leave it out")
        yield Judged(run, run.model, reference, run.model.path)
        return
    exported = finished.folder.model
    if checkpoint is None and exported.is_dir():
        whole = whole_checkpoints(finished.folder.checkpoints)
        state = read_state(whole[-1]) if whole else {"step": last_step(finished.folder)}
        policy = model_of(run, exported)
        yield Judged(run, policy, reference, str(exported), **_progress(state))
        return
    found = choose_checkpoint(finished, checkpoint or "last")
    state = read_state(found)
    start_distributed(timeout_minutes=run.distributed.timeout_minutes)

    def write() -> tempfile.TemporaryDirectory[str]:
        say(f"taking the weights out of {found}")
        holder = tempfile.TemporaryDirectory(prefix="dsdpo-policy-")
        export_checkpoint(finished, found, Path(holder.name) / "model")
        return holder

    holder = on_some_ranks(local_rank() == 0, write)
    places = gather_objects((node(), holder.name if holder else None))
    folder = next(Path(place) / "model" for where, place in places if place is not None and where == node())
    try:
        yield Judged(run, model_of(run, folder), reference, str(found), **_progress(state))
    finally:
        if holder is not None:
            holder.cleanup()


def _progress(state: dict[str, Any]) -> dict[str, Any]:
    """What `Judged` takes of a checkpoint's state; those of an older dsdpo do not have the number of steps."""
    return {name: state.get(name) for name in ("total_steps", "means")} | {"step": state.get("step", 0)}


def plan_judging(
    what: Judged, sources: list[SourceConfig], *, strategy: Literal["separate", "precomputed"], run_file: str | Path
) -> Plan:
    """The plan of a run over these pairs, which are its training and its held-out data, by the policy of `what`.

    Its reference is by `strategy` an engine or a table, or none. Collective. Raises `ConfigError` or `DataError`.
    """
    run, stored = what.run, STRATEGIES[strategy].settings.before_training
    content: dict[str, Any] = {name: run.model_dump(mode="json")[name] for name in KEPT}
    data = run.data.model_copy(update={"train": sources, "eval": None if stored else sources})
    given: dict[str, Any] = {"strategy": strategy if what.reference else "none"}
    if what.reference is not None:
        given |= {"deepspeed": run.reference.deepspeed, "score_tokens": run.reference.score_tokens}
        given["allow_other_tokenizer"] = run.reference.allow_other_tokenizer
        if what.reference.path != what.policy.path or what.reference.revision != what.policy.revision:
            given |= {"path": what.reference.path, "revision": what.reference.revision}
        elif what.policy.lora is not None:
            given["adapter"] = "base"
        if stored:
            given |= {"store": run.reference.store, "audit_rows": run.reference.audit_rows}
    content |= {
        "model": what.policy.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "reference": given,
        "train": {"seed": run.train.seed},
        "evaluation": {"length_buckets": run.evaluation.length_buckets},
        "tracking": {"entropy": run.tracking.entropy},
    }
    plan = plan_run(RunConfig.model_validate(content), run_file=run_file, writes_output=False)
    return plan if what.reference is None else replace(plan, reference=replace(plan.reference, model=what.reference))


def as_precomputed(plan: Plan, model: ModelConfig) -> Plan:
    """The plan with a model in the place of the reference, asked once for all pairs."""
    settings = STRATEGIES["precomputed"].settings.of(plan.run.reference)
    return replace(plan, reference=ReferencePlan("precomputed", settings, model, second_adapter=False))
