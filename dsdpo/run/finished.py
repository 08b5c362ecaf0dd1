"""A run that has been started before: its folder, its settings and its checkpoints, without starting anything."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.load import check_run, read_yaml
from dsdpo.config.run import RunConfig
from dsdpo.errors import CheckpointError, ConfigError
from dsdpo.run_folder import RunFolder
from dsdpo.training.checkpoint import read_state, whole_checkpoints
from dsdpo.training.patience import best_checkpoint


@dataclass(frozen=True)
class FinishedRun:
    """A run folder and the settings in it."""

    run: RunConfig
    folder: RunFolder

    @property
    def identity(self) -> dict[str, Any] | None:
        """Of its reference, as JSON; None: it has none."""
        try:
            found = json.loads(self.folder.identity.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def is_run_folder(path: Path) -> bool:
    """Whether dsdpo has trained in this folder."""
    return path.is_dir() and RunFolder(path).config.is_file()


def open_run(given: str | Path) -> FinishedRun:
    """The run in a folder, or whose config.yaml is given. Raises `ConfigError` where there is none."""
    path = Path(given).expanduser()
    if path.is_file() and path.name == RunFolder(path.parent).config.name:
        path = path.parent
    if not is_run_folder(path):
        what = "is no folder" if not path.is_dir() else f"has no {RunFolder(path).config.name}"
        raise ConfigError(f"RUN: {path} {what}; give the output_dir of a run, or the config.yaml in it")
    folder = RunFolder(path)
    settings = check_run(read_yaml(folder.config), {}, source=folder.config, folder=path)
    # The folder may have been moved since.
    return FinishedRun(settings.model_copy(update={"output_dir": str(path)}), folder)


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
