"""Weights & Biases: a run that goes on where it was, with what it takes to compare it with others.

The id is kept in the run folder, so that a resumed run is one run there. Rows are drawn over the step among their
values and not over W&B's own, which never goes back: a resumed run may log steps again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.run_folder import RunFolder
from dsdpo.training.checkpoint import sign
from dsdpo.training.mirrors import Mirror, step_name

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0  # to reach W&B's server; its own default is 90 s
HIGHER = ("rewards/accuracies", "rewards/margins")  # of training rows, whose best is the highest; the loss's the lowest


class WandbMirror(Mirror):
    """A run of W&B."""

    title = "W&B"

    def __init__(self, run: RunConfig, folder: RunFolder, session: Any) -> None:
        self.session = session
        self._step = step_name(run)
        self._prefix = "train/" if run.tracking.names == "trl" else ""
        self._defined: set[str] = set()
        session.define_metric("*", step_metric=self._step)
        self._define(f"{self._prefix}loss", best="min")
        for name in HIGHER:
            self._define(f"{self._prefix}{name}", best="max")
        self._save_files(folder)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name in metrics:
            if name.startswith("eval/"):
                self._define(name, best="min" if sign(name) > 0 else "max")
        self.session.log(metrics)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self.session.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows]), self._step: step})

    def alert(self, title: str, text: str, *, fatal: bool) -> None:
        self.session.alert(title=title, text=text, level="ERROR" if fatal else "WARN")

    def close(self, *, failed: bool) -> str | None:
        offline, files = self.session.settings._offline, Path(self.session.settings.sync_dir)
        self.session.finish(exit_code=1 if failed else 0)
        return f"W&B: send this run with: wandb sync {files}" if offline and files.exists() else None

    def _define(self, name: str, *, best: str) -> None:
        """Have the run's summary keep a metric's best and last value."""
        if name not in self._defined:
            self._defined.add(name)
            self.session.define_metric(name, step_metric=self._step, summary=f"{best},last")

    def _save_files(self, folder: RunFolder) -> None:
        """Keep the files that say what the run is as an artifact."""
        import wandb

        artifact = wandb.Artifact(f"run-{self.session.id}", type="run-files", description="what the run is")
        for path in (folder.config, folder.deepspeed, folder.deepspeed_reference, folder.environment, folder.identity):
            if path.is_file():
                artifact.add_file(str(path))
        if artifact.manifest.entries:
            self.session.log_artifact(artifact)


def _leave() -> None:
    """End W&B's own process, but wait for it no longer than for its start: that of 0.25 waits for a server for ever."""
    import wandb

    ending = threading.Thread(target=wandb.teardown, name="leaving W&B", daemon=True)
    ending.start()
    ending.join(START_TIMEOUT_S)


def start_wandb(run: RunConfig, folder: RunFolder, facts: dict[str, Any]) -> WandbMirror | None:
    """A W&B run under the id kept in the run folder, or None with a warning: tracking never stops training.

    What the settings leave open is taken from W&B's own environment variables. Without a login, or where the server is
    out of reach, files are written to be sent later; nobody is ever asked anything.
    """
    settings = run.tracking.wandb
    assert settings is not None
    given = settings.model_dump(exclude_none=True, exclude={"mode", "tags"})
    for key, variable, fallback in (
        ("project", "WANDB_PROJECT", "dsdpo"),
        ("name", "WANDB_NAME", name_of(Path(run.output_dir).resolve())),
    ):
        given.setdefault(key, os.environ.get(variable) or fallback)
    given |= {"tags": settings.tags or None, "config": {**run.model_dump(mode="json"), **facts}}
    try:
        mode = settings.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not logged_in():
            log.warning("W&B: this machine is not logged in, so the run is written to files to send later")
            mode = "offline"
        try:
            return WandbMirror(run, folder, _init_wandb(folder, mode, given))
        except Exception as error:
            if mode != "online":
                raise
            log.warning("W&B could not start (%s); files to send later, and metrics.jsonl, have every row", error)
            _leave()
            return WandbMirror(run, folder, _init_wandb(folder, "offline", given))
    except Exception as error:
        log.warning("W&B could not start (%s); metrics go to metrics.jsonl only", error)
        return None


def name_of(output: Path) -> str:
    """What a run is called by its folder; one called output, as dsdpo init has it, says nothing alone."""
    return output.parent.name if output.name == "output" else output.name


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


def logged_in() -> bool:
    """True if W&B finds a key on this machine; asks neither the user nor the server."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # before W&B 0.31
        return bool(wandb.api.api_key)
