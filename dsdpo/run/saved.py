"""Which checkpoint of a run is asked for, and what it was saved with."""

from __future__ import annotations

import math
import re
from pathlib import Path

from dsdpo.errors import CheckpointError
from dsdpo.run.finished import FinishedRun
from dsdpo.training.checkpoint import read_state, whole_checkpoints
from dsdpo.training.patience import best_checkpoint


def choose_checkpoint(run: FinishedRun, which: str) -> Path:
    """The whole checkpoint that is asked for: last, best, a step or the name of its folder.

    Raises `CheckpointError` where there is no such one.
    """
    whole = whole_checkpoints(run.folder.checkpoints)
    if not whole:
        finished = f"; the exported model is {run.folder.model}" if run.folder.model.exists() else ""
        raise CheckpointError(f"{run.folder}: no whole checkpoint in {run.folder.checkpoints}{finished}")
    if which == "last":
        return whole[-1]
    if which == "best":
        metric = run.run.checkpoint.best_metric
        found = best_checkpoint(run.folder.checkpoints, metric)
        if found is None:
            raise CheckpointError(f"{run.folder}: no checkpoint was evaluated by {metric}; give --checkpoint last")
        return found
    number = re.fullmatch(r"(?:step-)?0*(\d+)", Path(which).name)
    there = {int(path.name.removeprefix("step-")): path for path in whole}
    if number is None or int(number[1]) not in there:
        steps = ", ".join(map(str, there))
        raise CheckpointError(f"--checkpoint {which}: there is last, best and, by step, {steps} in {run.folder}")
    return there[int(number[1])]


def evaluation_at(checkpoint: Path) -> dict[str, float]:
    """The held-out metrics that a checkpoint was saved with; nothing if its step was not evaluated."""
    found = read_state(checkpoint).get("evaluation") or {}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}
