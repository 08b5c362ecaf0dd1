"""Token pairs on disk: written once per node, then opened memory-mapped by every rank.

A folder holds `tokens.bin` (int32, little-endian: prompt, chosen, rejected of each distinct row), `starts.npy` (where
each pair's tokens begin; a row used more than once is stored once), `lengths.npy`, `origins.npy` and `pairs.json`.
Beside them `checked.json` says which state of these files was last found to be what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsdpo.data.dropped_rows import DropReport
from dsdpo.errors import CacheError

TOKEN = np.dtype("<i4")
FILES = ("tokens.bin", "starts.npy", "lengths.npy", "origins.npy", "pairs.json")
CHECKED = "checked.json"


@dataclass(frozen=True)
class Pair:
    """One preference pair as token ids; prompt + chosen and prompt + rejected are what the model reads."""

    pair_id: int
    prompt: np.ndarray  # (P,) int32, at least one token
    chosen: np.ndarray  # (C,) int32, at least one token
    rejected: np.ndarray  # (R,) int32, at least one token


@dataclass(frozen=True)
class Pairs:
    """A whole data set of pairs, read from disk as they are asked for."""

    lengths: np.ndarray  # (N, 3) int32, tokens of prompt, chosen, rejected
    origins: np.ndarray  # (N, 2) int64, index into the section's sources and row in that source, counted from 0
    report: DropReport
    digest: str  # of token ids and order alone: the same on every machine and in every cache
    starts: np.ndarray  # (N,) int64, first token of each pair in `tokens`
    tokens: np.ndarray  # (M,) int32, memory-mapped

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, ids: Sequence[int]) -> list[Pair]:
        return [self._pair(int(pair_id)) for pair_id in ids]

    def _pair(self, pair_id: int) -> Pair:
        prompt, chosen, rejected = self.lengths[pair_id].tolist()
        start = int(self.starts[pair_id])
        tokens = self.tokens[start : start + prompt + chosen + rejected]
        return Pair(pair_id, tokens[:prompt], tokens[prompt : prompt + chosen], tokens[prompt + chosen :])


def write_tokens(folder: Path, chunks: Iterable[np.ndarray]) -> None:
    """Writes `tokens.bin` from token ids that come in chunks."""
    with (folder / "tokens.bin").open("wb") as file:
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype=TOKEN).data)


def write_index(
    folder: Path, *, starts: np.ndarray, lengths: np.ndarray, origins: np.ndarray, report: DropReport
) -> None:
    """Writes everything beside `tokens.bin`, in the shapes of `Pairs`."""
    num_tokens = (folder / "tokens.bin").stat().st_size // TOKEN.itemsize
    np.save(folder / "starts.npy", starts.astype(np.int64))
    np.save(folder / "lengths.npy", lengths.astype(np.int32))
    np.save(folder / "origins.npy", origins.astype(np.int64))
    facts: dict[str, Any] = {
        "digest": _digest(folder, starts, lengths),
        "origins": _array_digest(origins),
        "pairs": len(lengths),
        "tokens": num_tokens,
        "report": report.to_json(),
    }
    facts["facts"] = _facts_digest(facts)
    (folder / "pairs.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with the prepared pairs in `folder`, or None.

    Reads all of it, unless no file's size or time of modification has changed since it was last found whole.
    """
    try:
        stats = {name: (folder / name).stat() for name in FILES}
    except OSError as error:
        return f"{folder}: prepared pairs cannot be read ({error})"
    state = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    with suppress(OSError, ValueError):
        if json.loads((folder / CHECKED).read_text(encoding="utf-8")) == state:
            return None
    wrong = _damage(folder)
    if wrong is None:
        with suppress(OSError):  # a folder that may only be read is read whole each time
            partial = folder / f".{CHECKED}-{os.getpid()}"
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(folder / CHECKED)
    return wrong


def _damage(folder: Path) -> str | None:
    """What is wrong, from reading all of it."""
    try:
        pairs = open_pairs(folder)
        facts: dict[str, Any] = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    except CacheError as error:
        return str(error)
    if facts.get("facts") != _facts_digest(facts):
        return f"{folder / 'pairs.json'} is not what was written"
    if facts["digest"] != _digest(folder, pairs.starts, pairs.lengths):
        return f"{folder}: tokens, starts or lengths are not what was written"
    if facts["origins"] != _array_digest(pairs.origins):
        return f"{folder / 'origins.npy'} is not what was written"
    return None


def _digest(folder: Path, starts: np.ndarray, lengths: np.ndarray) -> str:
    """Of token ids and order."""
    digest = hashlib.sha256()
    with (folder / "tokens.bin").open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    for name, values in (("starts", starts), ("lengths", lengths)):
        digest.update(f"{name}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values, dtype="<i8").data)
    return digest.hexdigest()


def _array_digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<i8").data).hexdigest()


def _facts_digest(facts: dict[str, Any]) -> str:
    """Of everything in pairs.json but itself."""
    others = {key: value for key, value in facts.items() if key != "facts"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def open_pairs(folder: Path) -> Pairs:
    """The pairs that `prepare_pairs` left in `folder`. Raises CacheError where a file is missing or cut off."""
    try:
        facts: dict[str, Any] = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=TOKEN, mode="r")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("starts", "lengths", "origins")}
        report = DropReport.from_json(facts["report"])
        whole = len(tokens) == facts["tokens"] and all(len(array) == facts["pairs"] for array in arrays.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{folder}: prepared pairs cannot be read ({error}). Delete the folder and start again."
        ) from (error)
    if not whole:
        raise CacheError(f"{folder}: prepared pairs are not whole. Delete the folder and start again.")
    return Pairs(report=report, digest=facts["digest"], tokens=tokens, **arrays)
