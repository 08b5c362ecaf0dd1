"""Which engines a run needs, in which order they are built, and the reference that comes of them."""

from __future__ import annotations

from typing import Any

from dsdpo.commands.prepare import Plan, reference_model
from dsdpo.engine.build import build_policy, build_reference
from dsdpo.engine.ops import prepare_ops
from dsdpo.reference.base import Reference
from dsdpo.reference.separate import SeparateReference


def build_engines(plan: Plan) -> tuple[Any, Reference]:
    """The policy engine and the reference by the run's strategy. Collective."""
    run = plan.run
    prepare_ops(plan.policy_config, plan.reference_config)
    policy = build_policy(run, plan.policy_config, total_steps=plan.total_steps)
    engine = build_reference(reference_model(run), plan.reference_config)
    return policy, SeparateReference(engine, score_tokens=run.reference.score_tokens)
