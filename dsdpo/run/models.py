"""The two models of a run, in the order in which they are built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dsdpo.config.reference import STRATEGIES
from dsdpo.engine.build import build_policy, device, warm_up
from dsdpo.engine.layout_check import check_layout
from dsdpo.engine.quirks.compiled_ops import prepare_ops
from dsdpo.reference.base import Reference
from dsdpo.run.plan import Plan


def build_policy_and_reference(plan: Plan) -> tuple[Any, Reference]:
    """The policy engine, warmed up, and the reference by the run's strategy. Collective."""
    prepare_ops(plan.policy_config, plan.reference_config)
    strategy = reference_class(plan.reference.strategy)
    if plan.reference.before_training:  # before the policy exists, so that there is one model in memory at a time
        reference = strategy.build(plan, None)
        return build_warm_policy(plan), reference
    policy = build_warm_policy(plan)
    return policy, strategy.build(plan, policy)


def reference_class(strategy: str) -> type[Reference]:
    """The class that is registered for a strategy."""
    module, name = STRATEGIES[strategy].reference.split(":")
    found: type[Reference] = getattr(import_module(module), name)
    return found


def build_warm_policy(plan: Plan) -> Any:
    """The policy engine, after one pass that changes nothing. Collective."""
    policy = build_policy(
        plan.run,
        plan.policy_config,
        total_steps=plan.total_steps,
        layout=plan.layout.name,
        second_adapter=plan.reference.second_adapter,
    )
    warm_up(policy, plan.train.largest_batch(device()))
    check_layout(policy, plan.train, dtype=plan.run.model.dtype)
    return policy
