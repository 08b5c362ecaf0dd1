"""Rows that are in memory, as files: a data set of `datasets` or a list of dicts, by what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from dsdpo.atomic import replacing
from dsdpo.errors import DataError


def with_files(value: Any, key: str, folder: Callable[[], Path]) -> Any:
    """What `data.train` or `data.eval` was given, with a file's path in place of rows in memory.

    Rows may stand wherever a path may: alone, as the `path` of a source, in a list of sources and under the name of a
    held-out set. The files lie in `folder()`, named by their content: the same rows are the same file in every
    process. Raises `DataError` for what is neither rows nor settings.
    """
    if isinstance(value, datasets.Dataset):
        return write_rows(value, key, folder())
    if isinstance(value, (datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise DataError(
            f"{key} is a {type(value).__name__}: give a datasets.Dataset, such as one of its splits, or a list of rows"
        )
    if isinstance(value, Mapping):
        return {name: with_files(each, f"{key}.{name}", folder) if _holds_rows(each) else each
                for name, each in value.items()}  # fmt: skip
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], Mapping) and "path" not in value[0]:
            return write_rows(value, key, folder())
        return [with_files(each, f"{key}[{index}]", folder) for index, each in enumerate(value)]
    if value is None or isinstance(value, (str, Path)):
        return None if value is None else str(value)
    raise DataError(
        f"{key} is a {type(value).__name__}: give a path, a Hub id, a datasets.Dataset or a list of dicts, one a row"
    )


def _holds_rows(value: Any) -> bool:
    """Whether a setting of a source, or what a held-out set is given, may be rows."""
    return not isinstance(value, (str, int, float, bool, type(None))) and not (
        isinstance(value, Mapping) and "path" not in value
    )


def write_rows(rows: Iterable[Any], key: str, folder: Path) -> str:
    """Write rows as JSON Lines into `folder`, unless they are there; the file's path. Raises `DataError`."""
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{key}: row {number} is a {type(row).__name__}: each row must be a dict")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{key}: row {number} holds what JSON has no word for ({error}); give texts and numbers"
            ) from None
    if not lines:
        raise DataError(f"{key}: there are no rows; give at least one")
    content = ("\n".join(lines) + "\n").encode(errors="surrogatepass")
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.jsonl"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as file:
                file.write(content)
        except OSError as error:
            raise DataError(f"data.cache_dir: {folder} cannot be written ({error}). Give a folder that can.") from error
    return str(path)
