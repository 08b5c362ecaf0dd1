"""When training ends because held-out pairs no longer get better, and which checkpoint was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.training.checkpoint import score, sign, whole_checkpoints

BEST, SINCE = "patience/best", "patience/since"  # where they are kept from step to step


def note_evaluation(run: RunConfig, kept: dict[str, float], metrics: Mapping[str, float]) -> None:
    """Take note of an evaluation in `kept`, which goes into checkpoints.

    Raises `ConfigError` where a metric that the run goes by is not among those of the evaluation.
    """
    asked = {"evaluation.metric": run.evaluation.metric} if run.evaluation.patience else {}
    asked |= {"checkpoint.best_metric": run.checkpoint.best_metric} if run.checkpoint.keep_best else {}
    for key, name in asked.items():
        if name not in metrics:
            raise ConfigError(f"{key} {name} is no metric of this run's evaluation, which has {', '.join(metrics)}")
    if run.evaluation.patience is None:
        return
    value = sign(run.evaluation.metric) * metrics[run.evaluation.metric]
    better = math.isfinite(value) and value < kept.get(BEST, math.inf)
    kept[SINCE] = 0.0 if better else kept.get(SINCE, 0.0) + 1.0
    if better:
        kept[BEST] = value


def out_of_patience(run: RunConfig, kept: Mapping[str, float]) -> bool:
    """True if as many evaluations in a row as the run allows have brought nothing better."""
    return run.evaluation.patience is not None and kept.get(SINCE, 0.0) >= run.evaluation.patience


def best_checkpoint(checkpoints: Path, metric: str) -> Path | None:
    """The whole checkpoint with the best value of a metric, of equals the newest; None where none was evaluated."""
    scores = {path: score(path, metric) for path in reversed(whole_checkpoints(checkpoints))}
    found = {path: sign(metric) * value for path, value in scores.items() if value is not None}
    return min(found, key=found.__getitem__) if found else None
