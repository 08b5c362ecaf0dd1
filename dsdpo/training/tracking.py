"""Where metrics go: `metrics.jsonl` in the run folder is the record, W&B a mirror that may fail."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.distributed import rank

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0  # to reach W&B's server; its own default is 90 s


def drop_rows_after(folder: Path, step: int) -> None:
    """Take the rows of later steps out of `metrics.jsonl`: a resumed run writes them again. On rank 0."""
    path = folder / "metrics.jsonl"
    if path.exists():
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # The last row may have been cut off by what ended the run.
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
        whole = path.with_suffix(".partial")
        whole.write_text("".join(kept), encoding="utf-8")
        whole.replace(path)


class Tracker:
    """Writes metrics on rank 0 and does nothing on other ranks."""

    def __init__(self, run: RunConfig, folder: Path, *, facts: dict[str, Any] | None = None) -> None:
        """`facts` go to W&B beside the settings."""
        self.last_evaluation: dict[str, float] = {}
        self._active = rank() == 0
        self._wandb: Any = None
        if self._active:
            self._record = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            if run.tracking.wandb is not None:
                self._wandb = _start_wandb(run, folder, facts or {})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row: `step` first, then the metrics as they are named."""
        if "eval/loss" in metrics:
            self.last_evaluation = metrics
        if not self._active:
            return
        self._record.write(json.dumps({"step": step, **metrics}) + "\n")
        self._record.flush()
        if self._wandb is not None:
            try:
                self._wandb.log(metrics, step=step)
            except Exception as error:
                self._give_up_on_wandb(error)

    def close(self) -> None:
        """Finish the record and the mirror."""
        if not self._active:
            return
        self._record.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self._give_up_on_wandb(error)

    def _give_up_on_wandb(self, error: Exception) -> None:
        log.warning("W&B failed (%s); training goes on and metrics.jsonl has every row", error)
        self._wandb = None


def _start_wandb(run: RunConfig, folder: Path, facts: dict[str, Any]) -> Any:
    """A W&B run under the id kept in the run folder, or None with a warning: tracking never stops training."""
    settings = run.tracking.wandb
    assert settings is not None
    id_file = folder / "wandb_run_id"
    try:
        import wandb

        session = wandb.init(
            dir=str(folder),
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            config={**run.model_dump(mode="json"), **facts},
            settings=wandb.Settings(init_timeout=START_TIMEOUT_S),
            **{"name": Path(run.output_dir).name, **settings.model_dump(exclude_none=True)},
        )
        id_file.write_text(session.id + "\n")
        return session
    except Exception as error:
        log.warning("W&B could not start (%s); metrics go to metrics.jsonl only", error)
        return None
