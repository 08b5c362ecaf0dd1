"""Where rows come from: local files, folders and saved data sets, or the Hub; one table of examples in the end.

- A file: .jsonl, .json (an array of objects, or JSON Lines), .csv, .tsv, each also .gz; .parquet, .arrow.
- A folder of such files, or one with such files in data/ below it, by name. A split is a file's name without suffix and
  number (train-00000-of-00002.parquet, train_prefs.jsonl); where names speak of splits, exactly one must fit.
- A folder that `datasets` saved (`save_to_disk`).
- Anything else is a Hub id. A path that looks local (starts with . / or ~, has more than one /, ends like a data
  file) and is missing is an error, never a question to the Hub.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import numpy as np

from dsdpo.config.data import DataConfig, SourceConfig
from dsdpo.config.shipped import page
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.files import SUFFIXES, Row, has_known_suffix, read_file, without_nulls
from dsdpo.data.formats import RowRules, look_up, read_fields, rules_for
from dsdpo.data.slices import Slice, parse_slice
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
SHARD = re.compile(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?$")  # what the number of a part looks like
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
OTHER_DATA_SUFFIXES = (".txt", ".zip", ".tar", ".gz", ".zst", ".bz2", ".xz", ".xlsx", ".yaml", ".yml")
# Column pairs that say which response came first, not which is better, and columns that say that.
POSITIONS = re.compile(r"(?i)^(.*[-_. ])?(a|b|0|1|2|left|right|first|second)$|^(.*[a-z])[012]$")
LABELS = re.compile(r"(?i)^(winner.*|labels?|prefer.*|.*_preference|better_.*|best_.*|safer_.*|choice|verdict)$")
TRUTHS = ("0", "1", "0.0", "1.0", "False", "True", "None")  # what columns that each say yes or no hold
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
    unread: tuple[Path, ...] = ()  # data files of its folder that belong to no or another split
    rules: RowRules = field(default_factory=RowRules)  # how its rows are read
    rows: Slice | None = None  # of all that it has


def find_sources(
    configs: Sequence[SourceConfig], default_split: DefaultSplit, data: DataConfig | None = None
) -> list[Source]:
    """The sources, each found where it lies. Raises DataError for the first that is not there."""
    found = [
        _find(config, f"{SECTIONS[default_split]}[{index}]", default_split) for index, config in enumerate(configs)
    ]
    return [replace(source, rules=rules_for(source.config, data)) for source in found]


def read_rows(source: Source) -> Iterator[Row]:
    """The source's rows as (place, row), fields still under their own names.

    Raises DataError for an unreadable file, an empty source, and one whose rows lack the fields of preference pairs.
    """
    rows = _files_rows(source) if source.kind == "files" else _dataset_rows(source)
    head = [row for _, row in zip(range(HEAD_ROWS), rows, strict=False)]
    if not head:
        where = ", ".join(str(path) for path in source.files) or source.config.path
        what = "is empty" if source.rows is None else f"split {source.config.split} holds no row"
        raise DataError(f"{where}: {what}. {source.key} needs at least one preference pair.")
    _check_fields(source, [row for _, row in head if isinstance(row, dict)])
    return chain(head, rows)


def _files_rows(source: Source) -> Iterator[Row]:
    """Rows of files, one after the other; those that are counted for a slice are read twice."""
    rows = chain.from_iterable(read_file(path) for path in source.files)
    if source.rows is None:
        return rows
    known = sum(1 for path in source.files for _ in read_file(path)) if source.rows.counts else sys.maxsize
    part = source.rows.of(known)
    return islice(rows, part.start, max(part.start, part.stop))


def _dataset_rows(source: Source) -> Iterator[Row]:
    """Rows of a data set that `datasets` loads."""
    loaded = _load(source)
    numbers = range(len(loaded)) if source.rows is None else source.rows.of(len(loaded))
    part = loaded.select(numbers) if numbers and len(numbers) < len(loaded) else loaded
    for number, row in zip(numbers, part, strict=False):
        yield f"{source.config.path} row {number}", without_nulls(row)


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
    split, rows = parse_slice(config.split)
    if (path / "dataset_dict.json").is_file():
        fingerprint = _files_fingerprint(sorted(path.rglob("*")))
        return Source(config, key, "saved", (), split or default_split, fingerprint, rows=rows)
    if (path / "state.json").is_file():
        if split not in (None, "train"):
            raise DataError(f"{key}: {config.path} is a saved data set without splits. Remove split.")
        return Source(config, key, "saved", (), None, _files_fingerprint(sorted(path.rglob("*"))), rows=rows)
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{key}: {config.path} is neither a file nor a folder (a pipe or device). Give a file.")
    if not path.is_dir() and split not in (None, "train"):
        raise DataError(
            f"{key}: {config.path} is one file and has no splits. Remove split: {config.split}, or give a part "
            "of its rows, such as train[:1000] or train[95%:]."
        )
    files, unread = _files_of_folder(path, split, key, default_split) if path.is_dir() else ((path,), ())
    for file in files:
        if not has_known_suffix(file):
            raise DataError(f"{key}: {file}: the name does not end with a known format ({', '.join(SUFFIXES)}).")
    return Source(config, key, "files", files, None, _files_fingerprint(files), unread, rows=rows)


def _looks_local(path: str) -> bool:
    """Whether a missing path was meant as a file or folder and not as a Hub id."""
    suffixes = (*SUFFIXES, *OTHER_DATA_SUFFIXES)
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.lower().endswith(suffixes)


def _files_of_folder(
    folder: Path, split: str | None, key: str, default_split: str
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The folder's data files, only those of the split where their names speak of splits; and those left unread."""
    files = _data_files(folder) or _data_files(folder / "data")
    if not files:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir() and _data_files(path))
        hint = f" There are some in {', '.join(below)}: name one of these folders." if below else ""
        raise DataError(f"{key}: {folder} holds no data file ({', '.join(SUFFIXES)}).{hint}")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_name(path), []).append(path)
    if not any(_split_words(name) for name in by_split) and split not in by_split:
        if split not in (None, "train"):
            raise DataError(f"{key}: no file name in {folder} speaks of a split. Remove split: {split}.")
        return tuple(files), ()
    chosen = by_split[_matching_split(by_split, split or default_split, folder, key)]
    return tuple(chosen), tuple(path for path in files if path not in chosen)


def _data_files(folder: Path) -> list[Path]:
    """Files of a known format in a folder, by name; none where it is no folder."""
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and has_known_suffix(path)]
    return [path for path in files if path.name not in NO_DATA and not path.name.startswith(".")]


def _split_name(path: Path) -> str:
    """The file's name without its suffix and the number of its part."""
    suffix = max((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), key=len)
    stem = path.name[: -len(suffix)]
    return SHARD.sub("", stem) or stem


def _split_words(name: str) -> set[str]:
    """The splits that a name begins or ends with: train, validation or test."""
    words = re.split(r"[-._ ]+", name.lower())
    return {SPLIT_WORDS[word] for word in (words[0], words[-1]) if word in SPLIT_WORDS}


def _matching_split(names: Collection[str], wanted: str, folder: Path, key: str) -> str:
    """The one name that is the wanted split. Raises DataError where there is none, or more than one."""
    if wanted in names:
        return wanted
    standard = SPLIT_WORDS.get(wanted.lower(), wanted)
    alike = [name for name in names if SPLIT_WORDS.get(name.lower()) == standard]
    found = alike or [name for name in names if standard in _split_words(name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(sorted(found or names))
    if found:
        raise DataError(f"{key}: split {wanted!r} of {folder} may be any of: {listed}. Set split to one of them.")
    raise DataError(f"{key}: {folder} has no files of split {wanted!r}, only of: {listed}. Set split, or name a file.")


def _files_fingerprint(files: list[Path] | tuple[Path, ...]) -> str:
    """Hash over path, size and modification time of the files."""
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _find_on_hub(config: SourceConfig, key: str, default_split: str) -> Source:
    """A Hub data set, asked for once and briefly: `datasets` itself retries an unreachable Hub for 23 seconds."""
    name, rows = parse_slice(config.split)
    split = name or default_split
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        source = Source(config, key, "hub", (), split, "")
        return Source(config, key, "hub", (), split, f"offline:{_load(source)._fingerprint}", rows=rows)
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
    return Source(config.model_copy(update={"revision": info.sha}), key, "hub", (), split, fingerprint, rows=rows)


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


def _check_fields(source: Source, rows: list[dict[str, Any]]) -> None:
    """Raises DataError unless the first rows hold pairs, and every column that the config maps to."""
    names = sorted({name for row in rows for name in row})
    mapped = {ours: theirs for ours, theirs in source.rules.columns.items() if theirs}
    missing = {ours: theirs for ours, theirs in mapped.items() if not any(_holds(look_up(row, theirs)) for row in rows)}
    if not missing:
        found: set[str] = set()
        for row in rows:
            with suppress(BadRow):
                found |= {name for name, value in read_fields(row, source.rules).items() if value is not None}
        if not found or "completions" in found or {"completion", "label"} <= found:
            return  # each row says what is wrong with it
        missing = {name: mapped.get(name, name) for name in ("chosen", "rejected") if name not in found}
    labels = [name for name in names if LABELS.match(name)]
    if missing:
        what = ", ".join(theirs if ours == theirs else f"{theirs} (for {ours})" for ours, theirs in missing.items())
        hint = f", preferred: {labels[0]}" if labels and "preferred" not in mapped else ""
        raise DataError(
            f"{source.key}: {source.config.path} has no {what}; its fields are: {', '.join(names) or 'none'}. "
            "Preference pairs need chosen and rejected (and prompt, unless both are whole dialogues). If they have "
            f"other names here, map them: {source.key}.columns: {{chosen: its name, rejected: its name{hint}}}. "
            f"{page('data.md')} shows every layout that is read."
        )
    pair = [mapped.get(name, name) for name in ("chosen", "rejected")]
    one_hot = len(labels) > 1 and all(str(row.get(name)) in TRUTHS for row in rows for name in labels)
    advice = f"{{preferred: {labels[-1]}}}, and say in preferred_values what its values mean" if labels else ""
    if one_hot:
        advice = f'{{preferred: "{", ".join(labels)}"}}: of the columns for the first, the second and a tie one is 1'
    if labels and "preferred" not in source.rules.columns and all(POSITIONS.match(name) for name in pair):
        raise DataError(
            f"{source.key}.columns: {pair[0]} and {pair[1]} say which response came first, not which is better, and "
            f"{source.config.path} has columns that may: {', '.join(labels)}. Map it, {advice}; or set preferred to "
            "null if the first is always better."
        )


def _holds(value: Any) -> bool:
    """Whether a looked-up value is there: not null, and no list of nothing but nulls."""
    return any(item is not None for item in value) if isinstance(value, list) and value else value is not None


def _first_line(error: Any) -> str:
    """What an error says, without the advice below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
