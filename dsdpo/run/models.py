"""Which engines a run needs, in which order they are built, and the reference that comes of them."""

from __future__ import annotations

from typing import Any

from dsdpo.console import say
from dsdpo.engine.build import build_policy, build_reference, device, warm_up
from dsdpo.engine.layout_check import check_layout
from dsdpo.engine.lora import POLICY, adapter_pairs, merged_parameters
from dsdpo.engine.quirks.compiled_ops import prepare_ops
from dsdpo.reference.adapter import AdapterReference
from dsdpo.reference.base import Reference
from dsdpo.reference.look_ahead import LookAhead
from dsdpo.reference.separate import SeparateReference
from dsdpo.reference.snapshot import SnapshotReference
from dsdpo.reference.trdpo import Match, MovingAverage, MovingReference, match_parameters
from dsdpo.run.identity import identify_reference
from dsdpo.run.plan import Plan, reference_model
from dsdpo.run.precompute import precompute
from dsdpo.training.loop import Cadence


def build_policy_and_reference(plan: Plan) -> tuple[Any, Reference]:
    """The policy engine, warmed up, and the reference by the run's strategy. Collective."""
    prepare_ops(plan.policy_config, plan.reference_config)
    if plan.run.reference_strategy() == "precomputed":
        table = precompute(plan)  # before the policy exists, so that there is one model in memory at a time
        return warm_policy(plan), table
    policy = warm_policy(plan)
    match plan.run.reference_strategy():
        case "policy_snapshot":
            return policy, snapshot_reference(plan, policy)
        case "adapter":
            return policy, looking_ahead(plan, adapter_reference(plan, policy))
        case _:
            return policy, looking_ahead(plan, separate_reference(plan, policy))


def warm_policy(plan: Plan) -> Any:
    """The policy engine, after one pass that changes nothing. Collective."""
    policy = build_policy(plan.run, plan.policy_config, total_steps=plan.total_steps)
    warm_up(policy, plan.train.largest_batch(device()))
    check_layout(policy, plan.train, dtype=plan.run.model.dtype)
    return policy


def separate_reference(plan: Plan, policy: Any) -> Reference:
    """A frozen or moving reference in an engine of its own. Collective."""
    model = reference_model(plan.run)
    engine = build_reference(model, plan.reference_config, layout=plan.run.data.layout)
    check_layout(engine, plan.train, dtype=plan.run.model.dtype)
    reference = SeparateReference(engine, score_tokens=plan.run.reference.score_tokens)
    reference.identity = identify_reference(plan, engine.module, adapter=POLICY if model.lora else None)
    if not plan.run.reference.sync_ref_model:
        return reference
    plain = model.lora is None and plan.run.model.lora is not None
    sources = merged_parameters(policy.module) if plain else dict(policy.module.named_parameters())
    return moving(plan, reference, match_parameters(sources, engine.module), engine)


def adapter_reference(plan: Plan, policy: Any) -> Reference:
    """The policy's base weights, without adapter or with a second one, frozen or moving. Collective."""
    reference = AdapterReference(policy, score_tokens=plan.run.reference.score_tokens)
    reference.identity = identify_reference(plan, policy.module, adapter=reference.adapter)
    if not plan.run.reference.sync_ref_model:
        return reference
    return moving(plan, reference, adapter_pairs(policy.module.lm), policy)


def moving(plan: Plan, reference: Reference, matches: list[Match], engine: Any) -> MovingReference:
    """TR-DPO on a reference whose parameters `engine` holds."""
    settings = plan.run.reference
    average = MovingAverage(matches, engine, alpha=settings.ref_model_mixup_alpha)
    say(f"reference moves every {settings.ref_model_sync_steps} steps: {average.describe()}")
    return MovingReference(reference, average, every=settings.ref_model_sync_steps)


def looking_ahead(plan: Plan, reference: Reference) -> Reference:
    """The reference, asked for as many steps at a time as the run says."""
    settings = plan.run.reference
    if settings.look_ahead_steps == 1:
        return reference
    sync_every = settings.ref_model_sync_steps if settings.sync_ref_model else None
    return LookAhead(reference, steps=settings.look_ahead_steps, sync_every=sync_every)


def snapshot_reference(plan: Plan, policy: Any) -> SnapshotReference:
    """The policy's own log-probs of the steps to come, taken at each sync. Collective."""
    due = Cadence.of(plan.run, plan.total_steps)
    reference = SnapshotReference(
        policy,
        training=lambda step: plan.training_windows(device(), step),
        held_out=lambda: plan.held_out_windows(device()),
        evaluates_after=lambda step: plan.evaluation is not None and step <= plan.total_steps and due.evaluate(step),
        every=plan.run.reference.ref_model_sync_steps,
        score_tokens=plan.run.reference.score_tokens,
    )
    reference.identity = identify_reference(plan, policy.module, adapter=POLICY if plan.run.model.lora else None)
    return reference
