"""Weights that hold NaN or infinity: found before the first step and before the export, and called by name."""

from __future__ import annotations

from pathlib import Path

from dsdpo.config.run import RunConfig
from dsdpo.console import counted
from dsdpo.engine.shards import nonfinite_parameters
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError, ConfigError, TrainingError
from dsdpo.reference.base import Reference
from dsdpo.run.plan import Plan


def check_start(plan: Plan, policy: TrainingEngine, reference: Reference, checkpoint: Path | None) -> None:
    """Raise unless every weight that training starts from is a finite number. Collective."""
    if names := nonfinite_parameters(policy.module):
        what = f"{list_names(names)} hold NaN or infinity before training has begun"
        if checkpoint is not None:
            raise CheckpointError(f"{checkpoint}: {what}; go on from an earlier checkpoint")
        raise ConfigError(f"{named_model(plan.run)}: {what}; give a model whose weights are finite")
    scorer = reference.model_for_flops()
    if scorer is None or scorer[0] is policy.module.lm:
        return
    if names := nonfinite_parameters(scorer[0]):
        model = plan.reference.model.path
        raise ConfigError(f"reference.path: of {model}, {list_names(names)} hold NaN or infinity; give a whole model")


def check_trained(policy: TrainingEngine, run: RunConfig) -> None:
    """Raise `TrainingError` rather than have weights exported that are not finite. Collective."""
    if names := nonfinite_parameters(policy.module):
        raise TrainingError(
            f"{list_names(names)} hold NaN or infinity after training: nothing is exported. Lower "
            f"optimizer.learning_rate ({run.optimizer.learning_rate:g}) and start again, or go on from an earlier "
            "checkpoint"
        )


def named_model(run: RunConfig) -> str:
    """The policy's model as a message names it."""
    adapter = f" or model.lora.path {run.model.lora.path}" if run.model.lora and run.model.lora.path else ""
    return f"model.path: of {run.model.path}{adapter}"


def list_names(names: list[str]) -> str:
    """Tensors in a few words."""
    shown = ", ".join(name.removeprefix("lm.") for name in names[:3])
    return f"{counted(len(names), 'tensor')} ({shown}{', ...' if len(names) > 3 else ''})"
