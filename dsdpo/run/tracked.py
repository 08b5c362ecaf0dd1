"""What W&B and TensorBoard are told of a run beside its settings and metrics: facts, an estimate, some rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from dsdpo.distributed import rank
from dsdpo.engine.types import TrainingEngine
from dsdpo.run.estimate import forecast_of_plan
from dsdpo.run.output_folder import environment, git_commit, parameter_counts
from dsdpo.run.plan import Plan

log = logging.getLogger(__name__)


def expected(plan: Plan) -> dict[str, Any] | None:
    """What the run is forecast to take, for W&B; None where it has none, or nothing can be said of these models.

    On rank 0, and before engines are built, whose config would partition the blank models that are counted.
    """
    if plan.run.tracking.wandb is None or rank() != 0:
        return None
    try:
        found, machine = forecast_of_plan(plan)
    except Exception as error:
        log.warning("no estimate for W&B: %s", error)
        return None
    return {
        "machine": machine.gpu.name, "ranks": machine.ranks, "fits": found.fits, "phase": found.phase,
        "device_gib": found.device / 2**30, "host_gib": found.host_node / 2**30,
        "checkpoint_gib": found.checkpoint / 2**30, "step_s": found.time.total,
        "pairs_per_s": found.pairs_per_second,
    }  # fmt: skip


def facts(
    plan: Plan, policy: TrainingEngine, identity: dict[str, Any], estimate: dict[str, Any] | None
) -> dict[str, Any]:
    """What makes this run comparable with others, beside its settings; nothing on other ranks than 0."""
    if rank() != 0:
        return {}
    total, trainable = parameter_counts(policy)
    return {
        "resolved_deepspeed": plan.policy_config,
        "resolved_deepspeed_reference": plan.reference_config if plan.reference.own_engine else None,
        "environment": environment(),
        "git_commit": git_commit(Path.cwd()),  # of the user's own folder
        "parameters": total,
        "trainable_parameters": trainable,
        "training_pairs": len(plan.train.pairs),
        "held_out_pairs": len(plan.evaluation.pairs) if plan.evaluation else 0,
        "total_steps": plan.total_steps,
        "layout": plan.layout.name,
        "reference_identity": identity,
        "estimate": estimate,
    }


def inspected_rows(plan: Plan) -> list[dict[str, Any]]:
    """Some training pairs of all lengths as they are trained on: text with special tokens, and tokens of each part."""
    pairs, wanted = plan.train.pairs, plan.run.tracking.inspected_rows
    order = np.argsort(np.asarray(pairs.lengths).sum(1), kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(wanted, len(order))).astype(np.int64))
    found = []
    for number in order[places].tolist():
        parts = [pairs.tokens[start:end] for start, end in pairs.stretches(number)]
        texts = [str(plan.tokenizer.decode(part.tolist(), skip_special_tokens=False)) for part in parts]
        source, row = pairs.origins[number].tolist()
        found.append(
            {
                "source": pairs.sources[source].path,
                "row": row,
                "prompt": texts[0],
                "chosen": texts[1],
                "rejected": texts[2] if len(texts) > 2 else "",
                "tokens": ", ".join(str(len(part)) for part in parts),
            }
        )
    return found
