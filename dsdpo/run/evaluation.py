"""Held-out metrics outside of training: the same function, on engines that only answer."""

from __future__ import annotations

from collections.abc import Sequence

from dsdpo.config.data import SourceConfig
from dsdpo.console import say
from dsdpo.engine.build import device
from dsdpo.engine.download import fetch_model
from dsdpo.engine.quirks.compiled_ops import prepare_ops
from dsdpo.reference.base import Reference, build_checked_reference
from dsdpo.reference.none import NoReference
from dsdpo.reference.separate import SeparateReference
from dsdpo.run.judge import Judged, as_precomputed, plan_judging
from dsdpo.run.run import held_out_of
from dsdpo.training.evaluate import evaluate


def evaluate_judged(what: Judged, sources: Sequence[SourceConfig], *, run_file: str) -> dict[str, float]:
    """The metrics `eval/...` of a policy on pairs, as training would have them. Collective.

    Raises `ConfigError` or `DataError`, before a model loads.
    """
    plan = plan_judging(what, list(sources), strategy="separate", run_file=run_file)
    assert plan.evaluation is not None
    say(f"{what.name} on {len(plan.evaluation.pairs):,} pairs")
    prepare_ops(plan.policy_config, plan.reference_config)
    reference: Reference = NoReference()
    fetch_model(what.policy)
    if what.reference is not None:
        fetch_model(what.reference)
        settings = plan.run.reference
        engine, _ = build_checked_reference(plan)
        reference = SeparateReference(engine, score_tokens=settings.score_tokens)
    policy, _ = build_checked_reference(as_precomputed(plan, what.policy))
    windows, step = plan.held_out_windows(device()), what.loss_step
    return evaluate(policy, reference, what.loss(plan.run), windows, step=step, held_out=held_out_of(plan))
