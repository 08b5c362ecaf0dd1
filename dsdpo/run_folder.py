"""A run's folder: the name of every file and folder in it, once, with what lists, writes and clears them.

Importing this needs no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from dsdpo.atomic import delete, partial_path

Cleared = Literal["at start", "by export", "never"]


class _Entry:
    """A file or folder of a run: as an attribute of a `RunFolder`, its path."""

    def __init__(self, name: str, *, cleared: Cleared = "at start") -> None:
        """`cleared` says when a run that starts over in the folder takes an earlier run's away."""
        self.name, self.cleared = name, cleared

    def __get__(self, folder: RunFolder, kind: type[RunFolder]) -> Path:
        return folder.path / self.name


class RunFolder:
    """The `output_dir` of a run. An attribute for each file in it gives that file's path, there or not."""

    config = _Entry("config.yaml")  # the resolved settings
    deepspeed = _Entry("deepspeed.json")  # the policy's config, resolved
    deepspeed_reference = _Entry("deepspeed_reference.json")
    environment = _Entry("environment.json")  # command, versions, ranks
    identity = _Entry("identity.json")  # of the reference
    metrics = _Entry("metrics.jsonl")
    pairs = _Entry("pairs.jsonl")  # pair ids of each step
    nonfinite = _Entry("nonfinite.jsonl")  # steps that could not be taken
    samples = _Entry("samples.jsonl")  # generations of evaluations
    picture = _Entry("metrics.png")
    report = _Entry("report.html")
    wandb_id = _Entry("wandb_run_id")
    wandb = _Entry("wandb")
    tensorboard = _Entry("tensorboard")
    profile = _Entry("profile")  # traces of profiled steps
    checkpoints = _Entry("checkpoints")
    stop_file = _Entry("STOP")  # a user's: stop after this step
    stopped = _Entry("stopped.json")  # why and where a run has stopped early
    model = _Entry("model", cleared="by export")
    merged = _Entry("merged", cleared="by export")
    exporting = _Entry("export.partial")  # model and merged, until they are whole
    lock = _Entry("run.lock", cleared="never")  # who uses the folder

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def _entries(cls) -> list[_Entry]:
        return [entry for entry in vars(cls).values() if isinstance(entry, _Entry)]

    def replaceable(self) -> list[Path]:
        """Everything that a run which starts over here deletes or replaces, there or not."""
        return [self.path / entry.name for entry in self._entries() if entry.cleared != "never"]

    def existing(self) -> list[Path]:
        """What is there of a run."""
        return [path for path in self.replaceable() if path.exists()]

    def clear(self, *, keep: tuple[Path, ...] = ()) -> None:
        """Delete an earlier run's files but those to `keep`, and its model, which stays until there is a new one."""
        for entry in self._entries():
            if entry.cleared == "at start" and self.path / entry.name not in keep:
                delete(self.path / entry.name)
            delete(partial_path(self.path / entry.name))
