"""JSON-lines files of one row a step, appended to at once and kept consistent over kills and full disks."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from dsdpo.atomic import write_bytes
from dsdpo.run_folder import RunFolder

log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends rows unbuffered; rows that a full disk does not take are kept in memory and written first later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; warns once where the disk does not take it."""
        warned = bool(self._waiting)
        self._waiting += (json.dumps(without_nan(row), allow_nan=False) + "\n").encode()
        try:
            self._drain()
        except OSError as error:
            if not warned:
                log.warning("%s cannot be written (%s): its rows wait in memory", self._path, error)

    def _drain(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Write all rows and wait until they are on the disk. Raises OSError."""
        self._drain()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the rows still in memory; those that the disk does not take even now are lost, with a warning."""
        try:
            self._drain()
        except OSError as error:
            log.warning("%s lacks its last %d rows: %s", self._path, self._waiting.count(b"\n"), error)
        self._file.close()


def without_nan(value: Any) -> Any:
    """The value with null, as JSON has it, for each number in it that is not finite."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_rows(path: Path, *, after: int) -> None:
    """Delete rows of later steps than `after` from a file, and rows that were cut off; it may not exist."""
    if path.exists():
        kept = [row for row in path.read_bytes().splitlines(keepends=True) if _belongs(row, after)]
        write_bytes(path, b"".join(kept))


def _belongs(row: bytes, after: int) -> bool:
    try:
        return row.endswith(b"\n") and json.loads(row)["step"] <= after
    except (ValueError, KeyError, TypeError):  # what the disk made of a row when the machine went down
        return False


def read_metrics(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The training rows and the evaluation rows of a run folder's `metrics.jsonl`, by step.

    A last row that is still being written is left out. Raises OSError and ValueError, which names the line.
    """
    lines = RunFolder(folder).metrics.read_bytes().split(b"\n")
    rows = [_row(number, line) for number, line in enumerate(lines[:-1], start=1) if line.strip()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval/loss" in row]


def _row(number: int, line: bytes) -> dict[str, float]:
    """One row. Raises ValueError unless it is an object of numbers with a whole one for the step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is no JSON ({error})") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"line {number} is no row of metrics: it has no step")
    wrong = next((name for name, value in row.items() if not isinstance(value, (int, float, type(None)))), None)
    if wrong is not None:
        raise ValueError(f"line {number}: {wrong} is no number")
    return with_nan(row)


def with_nan(row: dict[str, Any]) -> dict[str, float]:
    """A row with NaN again where it has null: JSON has no number that is not finite."""
    return {name: math.nan if value is None else value for name, value in row.items()}
