"""Which checkpoints are kept: the newest, and the best by a held-out metric."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOWER_IS_BETTER = {"loss", "nll", "perplexity", "ties", "drift", "calibration_error"}
GOING = ".old"  # a checkpoint's last name: what is only half deleted is none


@dataclass(frozen=True)
class Keep:
    """How many checkpoints are kept."""

    last: int  # newest ones, at least 1
    best: int = 0  # best ones by `metric`; may be among the newest
    metric: str = "eval/loss"


def superseded(whole: Sequence[Path], keep: Keep) -> list[Path]:
    """Those of the whole checkpoints, given oldest first, that are neither among the newest nor among the best.

    A checkpoint of a step that was not evaluated is not among the best; of equals the newer one is the better.
    """
    kept = set(whole[-keep.last :])
    if keep.best:
        scores = {path: score(path, keep.metric) for path in whole}
        found = [path for path in reversed(whole) if scores[path] is not None]
        kept.update(sorted(found, key=lambda path: sign(keep.metric) * (scores[path] or 0.0))[: keep.best])
    return [path for path in whole if path not in kept]


def sign(metric: str) -> float:
    """1 if a lower value of a metric is better, -1 if a higher one is."""
    return 1.0 if LOWER_IS_BETTER & set(metric.split("/")) else -1.0


def score(path: Path, metric: str) -> float | None:
    """What a checkpoint's state says of a metric, None if it was not evaluated."""
    try:
        value = float(json.loads((path / "state.json").read_text())["evaluation"][metric])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if math.isfinite(value) else None


def remove(path: Path) -> None:
    """Delete a checkpoint so that it is either there or not, whenever this is interrupted."""
    if path.exists():
        going = path.with_suffix(GOING)
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going)


def sweep(folder: Path) -> None:
    """Delete what interrupted saving and deleting left behind."""
    for suffix in (".partial", GOING):
        for path in folder.glob(f"step-*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
