"""The best weights of a run that has kept its best checkpoints."""

from __future__ import annotations

from pathlib import Path

from dsdpo.console import say
from dsdpo.distributed import broadcast_object, rank
from dsdpo.engine.quirks.checkpoint_files import load_engine
from dsdpo.run.run import Run
from dsdpo.training.checkpoint import bring_parts, read_state
from dsdpo.training.patience import best_checkpoint


def restore_best(run: Run) -> dict[str, float]:
    """Give the policy the weights of the run's best checkpoint; that checkpoint's held-out metrics. Collective."""
    metric = run.plan.run.checkpoint.best_metric
    found: Path | None = broadcast_object(best_checkpoint(run.folder.checkpoints, metric) if rank() == 0 else None)
    if found is None:
        say(f"export.which best: no checkpoint was evaluated by {metric}, so the last weights are exported")
        return run.tracker.last_evaluation
    state = read_state(found)
    metrics: dict[str, float] = state["evaluation"]
    say(f"exporting the weights of {found.name}, whose {metric} is the best: {metrics[metric]:.4f}")
    if state["step"] != run.state.step:
        bring_parts(found, run.policy)
        load_engine(run.policy, found)
    return metrics
