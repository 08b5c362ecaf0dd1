"""Where metrics go: `metrics.jsonl` in the run folder is the record, W&B and TensorBoard mirrors that may fail.

`pairs.jsonl` beside it has the pair ids of every step, `samples.jsonl` what the models answer to fixed prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsdpo.config.load import dump_yaml
from dsdpo.config.run import RunConfig
from dsdpo.console import say
from dsdpo.distributed import rank
from dsdpo.run_folder import RunFolder
from dsdpo.training.jsonl import JsonlWriter, drop_rows
from dsdpo.training.lost_ranks import LAST_WORDS
from dsdpo.training.mirrors import Mirror, renamed
from dsdpo.training.tensorboard_mirror import TensorBoardMirror
from dsdpo.training.wandb_mirror import start_wandb

log = logging.getLogger(__name__)


def drop_rows_after(folder: RunFolder, step: int) -> None:
    """Take the rows of later steps out of a run's records: a resumed run writes them again. On rank 0."""
    for path in (folder.metrics, folder.pairs, folder.nonfinite, folder.samples):
        drop_rows(path, after=step)


class Tracker:
    """Writes metrics on rank 0 and does nothing on other ranks."""

    def __init__(
        self, run: RunConfig, folder: RunFolder, *, facts: dict[str, Any] | None = None, start_step: int = 0
    ) -> None:
        """`facts` go to W&B beside the settings; `start_step` is where a resumed run goes on."""
        self._run = run
        self.last_evaluation: dict[str, float] = {}
        self._evaluated_at = -1
        self._active = rank() == 0
        self._mirrors: list[Mirror] = []
        if self._active:
            self._record = JsonlWriter(folder.metrics)
            self._pairs = JsonlWriter(folder.pairs) if run.tracking.pairs else None
            self._samples = JsonlWriter(folder.samples) if run.evaluation.samples else None
            self._files = [file for file in (self._record, self._pairs, self._samples) if file is not None]
            if run.tracking.wandb is not None and (wandb := start_wandb(run, folder, facts or {})) is not None:
                self._mirrors.append(wandb)
            if run.tracking.tensorboard:
                self._mirrors.append(TensorBoardMirror(folder, settings=dump_yaml(run), start_step=start_step))
            LAST_WORDS.append(self._last_word)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row: `step` first, then the metrics as they are named."""
        if "eval/loss" in metrics:
            self.last_evaluation, self._evaluated_at = metrics, step
        if not self._active:
            return
        self._record.write({"step": step, **metrics})
        named = renamed(self._run, step, metrics)
        self._mirror(lambda mirror: mirror.log(step, named))

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
        columns = [name for name in ("step", "prompt", "policy", "reference") if name in rows[0]]
        table = [[row[name] for name in columns] for row in rows]
        self._mirror(lambda mirror: mirror.table(step, "samples", columns, table))

    def log_rows(self, name: str, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """A table of rows with the same keys, in W&B and TensorBoard alone."""
        if rows:
            table = [list(row.values()) for row in rows]
            self._mirror(lambda mirror: mirror.table(step, name, list(rows[0]), table))

    def alert(self, title: str, text: str, *, fatal: bool = False) -> None:
        """Tell whoever watches the run from elsewhere."""
        self._mirror(lambda mirror: mirror.alert(title, text, fatal=fatal))

    def _mirror(self, send: Callable[[Mirror], object]) -> None:
        """Send to every mirror; one that fails is left out from then on."""
        for mirror in list(self._mirrors):
            try:
                send(mirror)
            except Exception as error:
                log.warning("%s failed (%s); training goes on and metrics.jsonl has every row", mirror.title, error)
                self._mirrors.remove(mirror)

    def _last_word(self, reason: str) -> None:
        """Before this process is ended from beside a main thread that hangs: a rank is lost."""
        self.alert("Rank lost", reason, fatal=True)
        self._close_mirrors(failed=True)

    def evaluation_of(self, step: int) -> dict[str, float]:
        """The held-out metrics if they were taken after this very step, else nothing."""
        return self.last_evaluation if step == self._evaluated_at else {}

    def sync(self) -> None:
        """Have every row on the disk itself, before a checkpoint says that its step is done. Raises OSError."""
        if self._active:
            for file in self._files:
                file.sync()

    def close(self) -> None:
        """Finish the records and the mirrors."""
        self._finish(failed=False)

    def fail(self, error: BaseException) -> None:
        """Finish as a run that an error has ended, and tell whoever watches."""
        self.alert("Run failed", f"{type(error).__name__}: {error}"[:2000], fatal=True)
        self._finish(failed=True)

    def _finish(self, *, failed: bool) -> None:
        if not self._active:
            return
        if self._last_word in LAST_WORDS:
            LAST_WORDS.remove(self._last_word)
        self._active = False
        for file in self._files:
            file.close()
        self._close_mirrors(failed=failed)

    def _close_mirrors(self, *, failed: bool) -> None:
        def close(mirror: Mirror) -> None:
            if line := mirror.close(failed=failed):
                say(line)

        self._mirror(close)
        self._mirrors.clear()
