"""Engines for tests, built and trained a little in a rank of the pool, where whole runs would be too much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.pairs import Group


def save_lm(folder: Path, tokenizer_from: Path, lm: Any) -> str:
    """The model with the tokenizer of another folder, saved; its path as text."""
    from transformers import AutoTokenizer

    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return str(folder)


def planned(run: dict[str, Any]) -> Any:
    """The run's plan, with DeepSpeed's operators ready. Collective."""
    from dsdpo.config.run import RunConfig
    from dsdpo.engine.quirks.compiled_ops import prepare_ops
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run), writes_output=False)
    prepare_ops(plan.policy_config, plan.reference_config)
    return plan


def policy_of(plan: Any) -> Any:
    """The policy engine of a plan. Collective."""
    from dsdpo.engine.build import build_policy

    return build_policy(
        plan.run,
        plan.policy_config,
        total_steps=100,
        layout=plan.layout.name,
        second_adapter=plan.reference.second_adapter,
    )


def reference_of(plan: Any) -> Any:
    """The reference engine of a plan. Collective."""
    from dsdpo.engine.build import build_reference

    return build_reference(plan.run.model, plan.reference_config, layout=plan.layout.name)


def train_steps(policy: Any, batches: Sequence[PreferenceBatch]) -> list[float]:
    """An optimizer step on each batch that drives chosen and rejected apart; the margins before it. Collective."""
    from dsdpo.objective.logps import pair_logps

    margins = []
    for batch in batches:
        logps = pair_logps(policy, batch)
        margin = (logps.chosen - logps.rejected).mean()
        policy.backward(torch.nn.functional.softplus(-margin), scale_wrt_gas=False)
        policy.step()
        margins.append(float(margin))
    return margins


def logps_here(model: Any, pairs: Sequence[Group]) -> list[list[float]]:
    """Chosen and rejected log-probs under an engine, without gradient. Collective."""
    from dsdpo.data.batch import collate_padded
    from dsdpo.objective.logps import pair_logps

    with torch.no_grad():
        logps = pair_logps(model, collate_padded(list(pairs), pad_token_id=0))
    return [logps.chosen.tolist(), logps.rejected.tolist()]
