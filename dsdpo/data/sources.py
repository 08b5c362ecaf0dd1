"""Where rows come from: local files, folders and saved data sets, or the Hub; one table of examples in the end.

- A file: .jsonl, .json (an array of objects, or JSON Lines), each also .gz, .parquet, .arrow.
- A folder of such files, by name. Where names speak of splits (train-00000.parquet, test.jsonl), those of the split.
- A folder that `datasets` saved (`save_to_disk`).
- Anything else is a Hub id. A path that looks local (starts with . / or ~, has more than one /, ends like a data
  file) and is missing is an error, never a question to the Hub.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import numpy as np

from dsdpo.config.data import SourceConfig
from dsdpo.data.files import SUFFIXES, Row, has_known_suffix, read_file, without_nulls
from dsdpo.errors import DataError

DefaultSplit = Literal["train", "test"]
SECTIONS: dict[str, str] = {"train": "data.train", "test": "data.eval"}  # the config key that each default split serves

# As the Hub reads file names: words that stand for a split, between separators.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
OTHER_DATA_SUFFIXES = (".csv", ".tsv", ".txt", ".zip", ".tar", ".gz", ".zst", ".bz2", ".xz", ".xlsx", ".yaml", ".yml")
HEAD_ROWS = 100  # rows whose fields tell what a source has
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Source:
    """One source, found and fingerprinted; no row is read yet."""

    config: SourceConfig
    key: str  # where the config has it, e.g. data.train[0]
    kind: Literal["files", "saved", "hub"]
    files: tuple[Path, ...]  # of kind files, in reading order
    split: str | None  # of kinds saved (None: it has no splits) and hub
    fingerprint: str  # changes when the rows may have changed

    @property
    def columns(self) -> dict[str, str]:
        """Our field names to the source's, where they differ."""
        return {str(ours): theirs for ours, theirs in (self.config.columns or {}).items()}


def find_sources(configs: Sequence[SourceConfig], default_split: DefaultSplit) -> list[Source]:
    """The sources, each found where it lies. Raises DataError for the first that is not there."""
    return [_find(config, f"{SECTIONS[default_split]}[{index}]", default_split) for index, config in enumerate(configs)]


def read_rows(source: Source) -> Iterator[Row]:
    """The source's rows as (place, row), fields still under their own names.

    Raises DataError for an unreadable file, an empty source, and one whose rows lack the fields of preference pairs.
    """
    if source.kind == "files":
        rows: Iterator[Row] = chain.from_iterable(read_file(path) for path in source.files)
    else:
        rows = _dataset_rows(_load(source), source.config.path)
    head = [row for _, row in zip(range(HEAD_ROWS), rows, strict=False)]
    if not head:
        where = ", ".join(str(path) for path in source.files) or source.config.path
        raise DataError(f"{where}: is empty. {source.key} needs at least one preference pair.")
    _check_fields(source, {name for _, row in head if isinstance(row, dict) for name in row})
    return chain(head, rows)


def uses_of_rows(num_rows: int, *, weight: float, seed: int, index: int) -> np.ndarray:
    """(num_rows,) times each row is used per epoch: floor(weight), plus 1 for a seeded sample of the fraction."""
    whole = int(weight)
    uses = np.full(num_rows, whole, dtype=np.int32)
    extra = round((weight - whole) * num_rows)
    # As in the plan: a bit generator's raw stream never changes between numpy versions.
    uses[np.argsort(np.random.PCG64([seed, index]).random_raw(num_rows), kind="stable")[:extra]] += 1
    return uses


def _find(config: SourceConfig, key: str, default_split: str) -> Source:
    """The source behind one entry of data.train or data.eval."""
    path = Path(config.path).expanduser()
    if not path.exists():
        if _looks_local(config.path):
            raise DataError(f"{key}: {config.path} does not exist (looked in {Path.cwd()}). Give an existing path.")
        return _find_on_hub(config, key, default_split)
    if config.name is not None or config.revision is not None:
        raise DataError(f"{key}: {config.path} is local; name and revision are for Hub data sets. Remove them.")
    if (path / "dataset_dict.json").is_file():
        split = config.split or default_split
        return Source(config, key, "saved", (), split, _files_fingerprint(sorted(path.rglob("*"))))
    if (path / "state.json").is_file():
        if config.split is not None:
            raise DataError(f"{key}: {config.path} is a saved data set without splits. Remove split.")
        return Source(config, key, "saved", (), None, _files_fingerprint(sorted(path.rglob("*"))))
    files = _files_of_folder(path, config, key, default_split) if path.is_dir() else (path,)
    if not path.is_dir() and config.split is not None:
        raise DataError(f"{key}: {config.path} is one file and has no splits. Remove split: {config.split}.")
    for file in files:
        if not has_known_suffix(file):
            raise DataError(f"{key}: {file}: the name does not end with a known format ({', '.join(SUFFIXES)}).")
    return Source(config, key, "files", files, None, _files_fingerprint(files))


def _looks_local(path: str) -> bool:
    """Whether a missing path was meant as a file or folder and not as a Hub id."""
    suffixes = (*SUFFIXES, *OTHER_DATA_SUFFIXES)
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.lower().endswith(suffixes)


def _files_of_folder(folder: Path, config: SourceConfig, key: str, default_split: str) -> tuple[Path, ...]:
    """The folder's data files, only those of the split where their names speak of splits."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and has_known_suffix(path)]
    if not files:
        raise DataError(f"{key}: {folder} holds no data file ({', '.join(SUFFIXES)}).")
    splits = {path: _split_of(path) for path in files}
    if not any(splits.values()):
        if config.split is not None:
            raise DataError(f"{key}: no file name in {folder} speaks of a split. Remove split: {config.split}.")
        return tuple(files)
    wanted = config.split or default_split
    chosen = tuple(path for path, split in splits.items() if split == SPLIT_WORDS.get(wanted, wanted))
    if not chosen:
        found = ", ".join(sorted({split for split in splits.values() if split}))
        raise DataError(
            f"{key}: {folder} has no files of split {wanted!r}, only of: {found}. Set split, or name a file."
        )
    return chosen


def _split_of(path: Path) -> str | None:
    """The split that a file name speaks of: train, validation or test."""
    words = re.split(r"[-._ \d]+", path.name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _files_fingerprint(files: list[Path] | tuple[Path, ...]) -> str:
    """Hash over path, size and modification time of the files."""
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _find_on_hub(config: SourceConfig, key: str, default_split: str) -> Source:
    """A Hub data set, asked for once and briefly: `datasets` itself retries an unreachable Hub for 23 seconds."""
    split = config.split or default_split
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        source = Source(config, key, "hub", (), split, "")
        return Source(config, key, "hub", (), split, f"offline:{_load(source)._fingerprint}")
    try:
        info = huggingface_hub.HfApi().dataset_info(config.path, revision=config.revision, timeout=HUB_TIMEOUT_S)
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise DataError(
            f"{key}: {config.path} is neither a local path nor a data set on the Hub that this account may read "
            f"({_first_line(error)}). Correct the path, or log in (HF_TOKEN) for a private or gated data set."
        ) from error
    except Exception as error:  # the HTTP client's own errors, which the Hub library does not wrap
        raise DataError(
            f"{key}: {config.path} is no local path, and the Hub cannot be reached ({_first_line(error)}). "
            "Give a local path; or set HF_HUB_OFFLINE=1 if the data set is in this machine's Hub cache."
        ) from error
    fingerprint = repr((config.path, config.name, split, info.sha))
    return Source(config.model_copy(update={"revision": info.sha}), key, "hub", (), split, fingerprint)


def _load(source: Source) -> datasets.Dataset:
    """The data set behind a saved or Hub source, memory-mapped."""
    config = source.config
    try:
        if source.kind == "hub":
            return datasets.load_dataset(config.path, config.name, split=source.split, revision=config.revision)
        loaded = datasets.load_from_disk(str(Path(config.path).expanduser()))
    except Exception as error:  # Hub client, builders and arrow have no error in common
        offline = " (offline: HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"{source.key}: {config.path} cannot be loaded{offline}: {_first_line(error)} "
            "Check path, name, split and revision."
        ) from error
    if source.split is None:
        return loaded
    if source.split not in loaded:
        raise DataError(
            f"{source.key}: {config.path} has no split {source.split!r}, only {', '.join(loaded)}. Set split."
        )
    return loaded[source.split]


def _dataset_rows(dataset: datasets.Dataset, name: str) -> Iterator[Row]:
    """Rows of a data set that `datasets` loaded."""
    for number, row in enumerate(dataset):
        yield f"{name} row {number}", without_nulls(row)


def _check_fields(source: Source, found: set[str]) -> None:
    """Raises DataError unless the first rows have chosen and rejected, and every column that the config maps to."""
    needed = {name: source.columns.get(name, name) for name in ("chosen", "rejected")} | source.columns
    missing = {ours: theirs for ours, theirs in needed.items() if theirs not in found}
    if missing:
        what = ", ".join(theirs if ours == theirs else f"{theirs} (for {ours})" for ours, theirs in missing.items())
        raise DataError(
            f"{source.key}: {source.config.path} has no {what}; its fields are: {', '.join(sorted(found)) or 'none'}. "
            "Preference pairs need chosen and rejected (and prompt, unless both are whole dialogues). If they have "
            f"other names here, map them: {source.key}.columns: {{chosen: its name, rejected: its name}}."
        )


def _first_line(error: Any) -> str:
    """What an error says, without the advice below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
