"""A run that has been started before: its folder and its settings, without starting or importing much."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.load import check_run, read_yaml
from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.run_folder import RunFolder
from dsdpo.training.jsonl import read_metrics


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


def last_step(folder: RunFolder) -> int:
    """The last optimizer step in the run's metrics; 0 if there is none."""
    try:
        rows, _ = read_metrics(folder.path)
    except (OSError, ValueError):
        return 0
    return max((int(row["step"]) for row in rows), default=0)
