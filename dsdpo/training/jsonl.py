"""Files of one JSON object a line, each beginning with its step, that outlive a killed run and a full disk."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from dsdpo.run_folder import partial_path

log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends rows at once; those that a full disk does not take wait here, and go first when it does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a disk that takes none is warned about once."""
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
        """Have every row on the disk itself. Raises OSError."""
        self._drain()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what still waits; rows that the disk does not take even now are lost, with a warning."""
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
    """Take the rows of later steps than `after` out of a file, and any that were cut off; it may not exist."""
    if path.exists():
        kept = [row for row in path.read_bytes().splitlines(keepends=True) if _belongs(row, after)]
        whole = partial_path(path)
        whole.write_bytes(b"".join(kept))
        whole.replace(path)


def _belongs(row: bytes, after: int) -> bool:
    try:
        return row.endswith(b"\n") and json.loads(row)["step"] <= after
    except (ValueError, KeyError, TypeError):  # what the disk made of a row when the machine went down
        return False
