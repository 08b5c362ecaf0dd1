"""The two models of a run, in the order in which they are built."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from dsdpo.config.reference import STRATEGIES
from dsdpo.console import waiting
from dsdpo.engine.build import build_policy, device, warm_up
from dsdpo.engine.download import fetch_model
from dsdpo.engine.quirks.compiled_ops import prepare_ops
from dsdpo.engine.self_check import Answers, check_engine, check_same, computing_dtype, describe, measured_bias
from dsdpo.engine.types import TrainingEngine
from dsdpo.reference.base import Reference
from dsdpo.run.plan import Plan


def build_policy_and_reference(plan: Plan) -> tuple[TrainingEngine, Reference]:
    """The policy engine, warmed up, and the reference by the run's strategy, both found to be right. Collective."""
    with waiting("compiling DeepSpeed's operators"):
        prepare_ops(plan.policy_config, plan.reference_config)
    for model in (plan.run.model, plan.reference.model):
        with waiting(f"fetching {model.path}"):
            fetch_model(model)
    strategy = reference_class(plan.reference.strategy)
    if plan.reference.before_training:  # before the policy exists, so that there is one model in memory at a time
        reference = strategy.build(plan, None)
        policy, ours = build_warm_policy(plan)
    else:
        policy, ours = build_warm_policy(plan)
        with waiting(f"loading the reference {plan.reference.model.path}"):
            reference = strategy.build(plan, policy)
    theirs = reference.at_start
    if theirs is not None and starts_as_policy(plan):
        if plan.reference.model.quantization == plan.run.model.quantization:
            check_same(ours, theirs)
        elif reference.identity is not None:
            reference.identity = replace(reference.identity, bias=measured_bias(ours, theirs))
    describe(ours, *([] if theirs is None else [theirs]))
    return policy, reference


def starts_as_policy(plan: Plan) -> bool:
    """True if the reference has the weights that the policy starts from, in as many bits or fewer."""
    ours, theirs = plan.run.model, plan.reference.model
    if (theirs.path, theirs.revision) != (ours.path, ours.revision):
        return False
    if ours.lora is None or ours.lora.path is not None:
        return ours.lora == theirs.lora
    return ours.lora.init_lora_weights in (True, "gaussian")


def reference_class(strategy: str) -> type[Reference]:
    """The class that is registered for a strategy."""
    module, name = STRATEGIES[strategy].reference.split(":")
    found: type[Reference] = getattr(import_module(module), name)
    return found


def build_warm_policy(plan: Plan) -> tuple[TrainingEngine, Answers]:
    """The policy engine, after one pass that changes nothing, and what it answers on a few pairs. Collective."""
    with waiting(f"loading the policy {plan.run.model.path}"):
        policy = _policy_of(plan)
    with waiting("a first pass over the longest pairs"):
        warm_up(policy, plan.train.largest_batch(device()))
    dtype = computing_dtype(plan.policy_config, plan.run.model)
    with waiting("checking log-probs against the model's own"):
        return policy, check_engine(policy, plan.train, dtype=dtype, key="model.path", trains=True)


def _policy_of(plan: Plan) -> TrainingEngine:
    return build_policy(
        plan.run,
        plan.policy_config,
        total_steps=plan.total_steps,
        layout=plan.layout.name,
        second_adapter=plan.reference.second_adapter,
        longest=plan.longest,
        sequence=plan.sequence,
    )
