"""When training ends because held-out pairs no longer get better, and which checkpoint was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dsdpo.config.run import RunConfig
from dsdpo.config.unknown_keys import did_you_mean
from dsdpo.data.pairs import Pairs
from dsdpo.errors import ConfigError
from dsdpo.training.checkpoint import score, sign, whole_checkpoints
from dsdpo.training.groups import GROUPED, groupings

BEST, SINCE = "patience/best", "patience/since"  # where they are kept from step to step


# Metrics of held-out data; some need rated completions, a reference, entropies, or pairs of other lengths.
METRICS = (
    *("loss", "kl", "entropy", "pairs", "desirable", "nll/chosen", "perplexity/chosen", "reference/drift"),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "ties", "margins", "calibration_error")),
    *("rewards/accuracies_chosen_longer", "rewards/accuracies_chosen_shorter", "rewards/length_correlation"),
    *(f"{name}/{side}" for name in ("logps", "lengths") for side in ("chosen", "rejected")),
)


def asked_for(run: RunConfig) -> dict[str, str]:
    """The metrics that a run goes by, by setting."""
    asked = {"evaluation.metric": run.evaluation.metric} if run.evaluation.patience else {}
    return asked | ({"checkpoint.best_metric": run.checkpoint.best_metric} if run.checkpoint.keep_best else {})


def check_metrics(run: RunConfig, held_out: Pairs) -> None:
    """Raise `ConfigError` where a run goes by a metric that no evaluation of its held-out pairs can have."""
    found = groupings(held_out, run.data.eval or (), run.evaluation.length_buckets)
    groups = [name for grouping in found for name in grouping.names]
    parts = [*run.loss.types, *(["nll"] if run.loss.rpo_alpha else [])]
    known = [*METRICS, *(f"loss/{name}" for name in parts)]
    names = {f"eval/{name}" for name in known}
    for group in groups:
        part = group.startswith(("source/", "length/"))
        names |= {f"eval/{group}/{name}" for name in ((*GROUPED, "pairs") if part else known)}
    for key, name in asked_for(run).items():
        if name not in names:
            apart = f", and {', '.join(f'eval/{group}/...' for group in groups)}" if groups else ""
            raise ConfigError(
                f"{key}: {name} is no metric of this run's evaluation{did_you_mean(name, names)}; there are eval/ with "
                f"{', '.join(METRICS)}{apart}"
            )


def note_evaluation(run: RunConfig, kept: dict[str, float], metrics: Mapping[str, float]) -> None:
    """Take note of an evaluation in `kept`, which goes into checkpoints.

    Raises `ConfigError` where a metric that the run goes by is not among those of the evaluation.
    """
    for key, name in asked_for(run).items():
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
