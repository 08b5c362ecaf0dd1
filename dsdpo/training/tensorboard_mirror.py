"""TensorBoard event files in the run folder: `tensorboard --logdir OUTPUT_DIR/tensorboard`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsdpo.run_folder import RunFolder
from dsdpo.training.mirrors import STEP, TRL_STEP, Mirror


class TensorBoardMirror(Mirror):
    """Scalars by step, and samples as text."""

    title = "TensorBoard"

    def __init__(self, folder: RunFolder, *, settings: str, start_step: int) -> None:
        """`settings`: the run file's text. What an earlier part of the run wrote after `start_step` is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(  # type: ignore[no-untyped-call]
            log_dir=str(folder.tensorboard), purge_step=start_step + 1 if start_step else None
        )
        if not start_step:
            self._writer.add_text("run", f"```yaml\n{settings}\n```", 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name not in (STEP, TRL_STEP):
                self._writer.add_scalar(name, value, step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = ["|".join(columns), "|".join("---" for _ in columns)]
        lines += ["|".join(str(value).replace("|", "\\|").replace("\n", "<br>") for value in row) for row in rows]
        self._writer.add_text(name, "\n".join(lines), step)

    def close(self, *, failed: bool) -> str | None:
        self._writer.close()
        return None
