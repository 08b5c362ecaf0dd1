"""Where metrics go: `metrics.jsonl` in the run folder is the record, W&B a mirror that may fail.

`pairs.jsonl` beside it has the pair ids of every step, `samples.jsonl` what the models answer to fixed prompts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdpo.config.run import RunConfig
from dsdpo.console import say
from dsdpo.distributed import rank
from dsdpo.run_folder import RunFolder
from dsdpo.training.jsonl import JsonlWriter, drop_rows

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0  # to reach W&B's server; its own default is 90 s


def drop_rows_after(folder: RunFolder, step: int) -> None:
    """Take the rows of later steps out of a run's records: a resumed run writes them again. On rank 0."""
    for path in (folder.metrics, folder.pairs, folder.nonfinite, folder.samples):
        drop_rows(path, after=step)


class Tracker:
    """Writes metrics on rank 0 and does nothing on other ranks."""

    def __init__(self, run: RunConfig, folder: RunFolder, *, facts: dict[str, Any] | None = None) -> None:
        """`facts` go to W&B beside the settings."""
        self.last_evaluation: dict[str, float] = {}
        self._evaluated_at = -1
        self._active = rank() == 0
        self._wandb: Any = None
        if self._active:
            self._record = JsonlWriter(folder.metrics)
            self._pairs = JsonlWriter(folder.pairs) if run.tracking.pairs else None
            self._samples = JsonlWriter(folder.samples) if run.evaluation.samples else None
            self._files = [file for file in (self._record, self._pairs, self._samples) if file is not None]
            if run.tracking.wandb is not None:
                self._wandb = _start_wandb(run, folder, facts or {})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row: `step` first, then the metrics as they are named."""
        if "eval/loss" in metrics:
            self.last_evaluation, self._evaluated_at = metrics, step
        if not self._active:
            return
        self._record.write({"step": step, **metrics})
        self._mirror(step, metrics)

    def log_pairs(self, step: int, pair_ids: np.ndarray) -> None:
        """The pairs (G,) of all ranks that a step used."""
        if self._active and self._pairs is not None:
            self._pairs.write({"step": step, "pair_ids": pair_ids.tolist()})

    def log_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """What the models answered after a step: a line for each prompt, and a table of W&B."""
        if not self._active or self._samples is None:
            return
        for row in rows:
            self._samples.write(row)
        if self._wandb is not None:
            columns: list[str] = [name for name in ("step", "prompt", "policy", "reference") if name in rows[0]]
            self._mirror(step, {"samples": _wandb_table(columns, [[row[name] for name in columns] for row in rows])})

    def _mirror(self, step: int, values: dict[str, Any]) -> None:
        if self._wandb is None:
            return
        try:
            self._wandb.log(values, step=step)
        except Exception as error:
            self._give_up_on_wandb(error)

    def evaluation_of(self, step: int) -> dict[str, float]:
        """The held-out metrics if they were taken after this very step, else nothing."""
        return self.last_evaluation if step == self._evaluated_at else {}

    def sync(self) -> None:
        """Have every row on the disk itself, before a checkpoint says that its step is done. Raises OSError."""
        if self._active:
            for file in self._files:
                file.sync()

    def close(self) -> None:
        """Finish the records and the mirror."""
        if not self._active:
            return
        for file in self._files:
            file.close()
        if self._wandb is not None:
            try:
                offline, files = self._wandb.settings._offline, Path(self._wandb.settings.sync_dir)
                self._wandb.finish()
                if offline and files.exists():
                    say(f"W&B: send this run with: wandb sync {files}")
            except Exception as error:
                self._give_up_on_wandb(error)

    def _give_up_on_wandb(self, error: Exception) -> None:
        log.warning("W&B failed (%s); training goes on and metrics.jsonl has every row", error)
        self._wandb = None


def _wandb_table(columns: list[str], data: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=columns, data=data)


def _start_wandb(run: RunConfig, folder: RunFolder, facts: dict[str, Any]) -> Any:
    """A W&B run under the id kept in the run folder, or None with a warning: tracking never stops training.

    What the settings leave open is taken from W&B's own environment variables. Without a login, or where the server is
    out of reach, files are written to be sent later; nobody is ever asked anything.
    """
    settings = run.tracking.wandb
    assert settings is not None
    given = settings.model_dump(exclude_none=True, exclude={"mode", "tags"})
    for key, variable, fallback in (
        ("project", "WANDB_PROJECT", "dsdpo"),
        ("name", "WANDB_NAME", Path(run.output_dir).name),
    ):
        given.setdefault(key, os.environ.get(variable) or fallback)
    given |= {"tags": settings.tags or None, "config": {**run.model_dump(mode="json"), **facts}}
    try:
        import wandb

        mode = settings.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not _logged_in(wandb):
            log.warning("W&B: this machine is not logged in, so the run is written to files to send later")
            mode = "offline"
        try:
            return _init_wandb(folder, mode, given)
        except Exception as error:
            if mode != "online":
                raise
            log.warning("W&B could not start (%s); files to send later, and metrics.jsonl, have every row", error)
            wandb.teardown()
            return _init_wandb(folder, "offline", given)
    except Exception as error:
        log.warning("W&B could not start (%s); metrics go to metrics.jsonl only", error)
        return None


def _init_wandb(folder: RunFolder, mode: Any, given: dict[str, Any]) -> Any:
    import wandb

    session = wandb.init(
        dir=str(folder),
        id=folder.wandb_id.read_text().strip() if folder.wandb_id.exists() else None,
        resume="allow",
        mode=mode,
        settings=wandb.Settings(init_timeout=START_TIMEOUT_S),
        **given,
    )
    folder.wandb_id.write_text(session.id + "\n")
    return session


def _logged_in(wandb: Any) -> bool:
    """True if W&B finds a key on this machine; asks neither the user nor the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # before W&B 0.31
        return bool(wandb.api.api_key)
