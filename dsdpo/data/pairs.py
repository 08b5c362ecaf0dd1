"""Prepared data on disk: written once per node, then opened memory-mapped by every rank.

A folder holds `tokens.bin` (int32, little-endian: prompt and responses of each distinct row), `starts.npy` (where each
group's tokens begin; a row used more than once is stored once), `lengths.npy`, `origins.npy`, an array more for each of
EXTRAS that the data has, and `pairs.json`. Beside them `checked.json` says which state of these files was last found to
be what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dsdpo.atomic import digest_of, write_text
from dsdpo.data.dropped_rows import DropReport
from dsdpo.errors import CacheError, DataError

TOKEN = np.dtype("<i4")
ARRAYS = ("starts", "lengths", "origins")
EXTRAS = {
    "unlearned": np.int64,
    "margins": np.float32,
    "weights": np.float32,
    "confidences": np.float32,
    "scores": np.float32,
}
"""Arrays that only some data has, and their types; see `Pairs`."""
FILES = ("tokens.bin", *(f"{name}.npy" for name in ARRAYS), "pairs.json")
CHECKED = "checked.json"
NO_RANGES = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class Group:
    """A prompt with n responses as token ids: a preference pair (n = 2, chosen then rejected), one rated response
    (n = 1) or a ranked list, best first (n > 2). Prompt + response is what the model reads."""

    pair_id: int
    prompt: np.ndarray  # (P,) int32, at least one token
    responses: tuple[np.ndarray, ...]  # n of (C,) int32; without a token where the group has fewer than the data's most
    learned: tuple[np.ndarray | None, ...] = ()  # n of (C,) bool, tokens to learn; None, or () for all n: all of them
    margin: float | None = None  # how much better the chosen response is, as the data says
    weight: float | None = None  # of the group in a loss that uses it
    confidence: float | None = None  # that its label is right, 0 to 1
    scores: tuple[float, ...] | None = None  # n, of the responses: the higher, the better

    @classmethod
    def of(cls, pair_id: int, prompt: np.ndarray, *responses: np.ndarray) -> Group:
        """A group of these responses, all of whose tokens are learned."""
        return cls(pair_id, prompt, responses)

    def learned_of(self, index: int) -> np.ndarray | None:
        """Which tokens of a response are learned; None: all."""
        return self.learned[index] if self.learned else None


@dataclass(frozen=True)
class SourceFacts:
    """What became of one source's rows; weights, by which rows are used more than once, have no part in it."""

    path: str  # or Hub id, as the user gave it
    rows: int  # read and used
    pairs: int  # made of them
    dropped: dict[str, int]  # rows by kind of problem
    truncated: int  # pairs with a response that was cut
    tokens: int  # of all pairs, prompt and response of each response
    duplicates: int  # pairs with the same tokens as an earlier one
    files: tuple[str, ...] = ()  # names of the files that were read, in order; none of a saved or Hub data set
    unread: tuple[str, ...] = ()  # names of data files beside them that were not

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SourceFacts:
        """The facts as JSON holds them."""
        return cls(**values | {name: tuple(values.get(name, ())) for name in ("files", "unread")})


@dataclass(frozen=True)
class Pairs:
    """A whole data set of groups, pairs as a rule, read from disk as they are asked for."""

    lengths: np.ndarray  # (N, 1 + n) int32, tokens of prompt and of each response; 0 where there is no such response
    origins: np.ndarray  # (N, 2) int64, index into the section's sources and row in that source, counted from 0
    report: DropReport
    digest: str  # of what is trained on and its order alone: the same on every machine and in every cache
    starts: np.ndarray  # (N,) int64, first token of each group in `tokens`
    tokens: np.ndarray  # (M,) int32, memory-mapped
    unlearned: np.ndarray = field(default_factory=NO_RANGES.copy)  # (U, 2) int64, ascending [start, end) in `tokens`
    margins: np.ndarray | None = None  # (N,) float32
    weights: np.ndarray | None = None  # (N,) float32
    confidences: np.ndarray | None = None  # (N,) float32
    scores: np.ndarray | None = None  # (N, n) float32
    sources: tuple[SourceFacts, ...] = ()
    borrowed: np.ndarray | None = None  # (N,) int64, first token of a last response that is another group's first

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, ids: Sequence[int]) -> list[Group]:
        return [self._group(int(pair_id)) for pair_id in ids]

    @property
    def group_size(self) -> int:
        """n: responses of the largest group, 2 for pairs."""
        return self.lengths.shape[1] - 1

    def subset(self, rows: np.ndarray) -> Pairs:
        """These rows alone, in this order."""
        names = (*ARRAYS, "margins", "weights", "confidences", "scores", "borrowed")
        chosen = {name: getattr(self, name)[rows] for name in names if getattr(self, name) is not None}
        return replace(self, **chosen)

    def stretches(self, pair_id: int) -> list[tuple[int, int]]:
        """[start, end) in `tokens` of a group's prompt and of each of its responses."""
        ends = np.cumsum([int(self.starts[pair_id]), *self.lengths[pair_id].tolist()]).tolist()
        parts = list(pairwise(ends))
        if self.borrowed is not None:
            start = int(self.borrowed[pair_id])
            parts[-1] = start, start + int(self.lengths[pair_id, -1])
        return parts

    def unlearned_ranges(self, start: int, end: int) -> np.ndarray:
        """(u, 2) int64, ranges of tokens that are not learned within [start, end) of `tokens`, counted from `start`."""
        if not len(self.unlearned):
            return NO_RANGES
        first = np.searchsorted(self.unlearned[:, 1], start, side="right")
        last = np.searchsorted(self.unlearned[:, 0], end)
        return np.clip(self.unlearned[first:last], start, end) - start

    def _group(self, pair_id: int) -> Group:
        prompt, *responses = self.stretches(pair_id)
        learned = []
        for start, end in responses:
            mask = np.ones(end - start, dtype=bool)
            for first, last in self.unlearned_ranges(start, end).tolist():
                mask[first:last] = False
            learned.append(None if mask.all() else mask)
        return Group(
            pair_id,
            self.tokens[prompt[0] : prompt[1]],
            tuple(self.tokens[start:end] for start, end in responses),
            learned=tuple(learned) if any(mask is not None for mask in learned) else (),
            margin=None if self.margins is None else float(self.margins[pair_id]),
            weight=None if self.weights is None else float(self.weights[pair_id]),
            confidence=None if self.confidences is None else float(self.confidences[pair_id]),
            scores=None if self.scores is None else tuple(self.scores[pair_id].tolist()),
        )


def with_mismatched(pairs: Pairs, max_length: int, *, key: str = "data.train") -> Pairs:
    """Groups of one response, each with a second one that answers another prompt: that of the next group with one.

    KTO estimates the KL between policy and reference on such mismatched pairs (Ethayarajh et al. 2024, arXiv
    2402.01306, sec. 4.1). A borrowed response is cut where it would exceed `max_length` behind its new prompt. Raises
    DataError where all prompts are the same.
    """
    assert pairs.group_size == 1, f"groups of {pairs.group_size} responses"
    lenders = np.array([_lender(pairs, pair_id, key) for pair_id in range(len(pairs))])
    lengths = np.column_stack([pairs.lengths, pairs.lengths[lenders, 1]]).astype(np.int32)
    lengths[:, 2] = np.minimum(lengths[:, 2], max_length - lengths[:, 0])
    digest = hashlib.sha256(f"{pairs.digest} mismatched {max_length}".encode()).hexdigest()
    borrowed = pairs.starts[lenders] + pairs.lengths[lenders, 0]
    return replace(pairs, lengths=lengths, borrowed=borrowed, digest=digest)


def with_nothing_beside(pairs: Pairs) -> Pairs:
    """Groups of one response, each with a second one without a token: for losses that ask nothing more of them."""
    assert pairs.group_size == 1, f"groups of {pairs.group_size} responses"
    return replace(pairs, lengths=np.column_stack([pairs.lengths, np.zeros_like(pairs.lengths[:, 1])]))


def _lender(pairs: Pairs, pair_id: int, key: str) -> int:
    """The next group, from the last one on to the first, that has another prompt."""
    start, end = pairs.stretches(pair_id)[0]
    for step in range(1, len(pairs)):
        other = (pair_id + step) % len(pairs)
        if pairs.lengths[other, 0] != end - start:
            return other
        first = int(pairs.starts[other])
        if not np.array_equal(pairs.tokens[start:end], pairs.tokens[first : first + end - start]):
            return other
    raise DataError(
        f"{key}: all rows have the same prompt, and KTO needs completions of other prompts to estimate the KL with: "
        "give rows with several prompts, or set loss.type to apo_zero_unpaired"
    )


def write_tokens(folder: Path, chunks: Iterable[np.ndarray]) -> None:
    """Writes `tokens.bin` from token ids that come in chunks."""
    with (folder / "tokens.bin").open("wb") as file:
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype=TOKEN).data)


def write_index(
    folder: Path,
    *,
    starts: np.ndarray,
    lengths: np.ndarray,
    origins: np.ndarray,
    report: DropReport,
    extras: Mapping[str, np.ndarray] | None = None,
    sources: Sequence[SourceFacts] = (),
) -> None:
    """Writes everything beside `tokens.bin`, in the shapes of `Pairs`; `extras` by their names there."""
    num_tokens = (folder / "tokens.bin").stat().st_size // TOKEN.itemsize
    np.save(folder / "starts.npy", starts.astype(np.int64))
    np.save(folder / "lengths.npy", lengths.astype(np.int32))
    np.save(folder / "origins.npy", origins.astype(np.int64))
    extras = {name: np.asarray(values).astype(EXTRAS[name]) for name, values in (extras or {}).items()}
    for name, values in extras.items():
        np.save(folder / f"{name}.npy", values)
    facts: dict[str, Any] = {
        "digest": _digest(folder, starts, lengths, extras),
        "origins": _array_digest(origins),
        "extras": list(extras),
        "pairs": len(lengths),
        "tokens": num_tokens,
        "sources": [asdict(source) for source in sources],
        "report": report.to_json(),
    }
    facts["facts"] = _facts_digest(facts)
    (folder / "pairs.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with the prepared pairs in `folder`, or None.

    Reads all of it, unless no file's size or time of modification has changed since it was last found whole.
    """
    try:
        names = sorted({*FILES, *(path.name for path in folder.glob("*.npy"))})
        stats = {name: (folder / name).stat() for name in names}
    except OSError as error:
        return f"{folder}: prepared pairs cannot be read ({error})"
    state = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    with suppress(OSError, ValueError):
        if json.loads((folder / CHECKED).read_text(encoding="utf-8")) == state:
            return None
    wrong = _damage(folder)
    if wrong is None:
        with suppress(OSError):  # a folder that may only be read is read whole each time
            write_text(folder / CHECKED, json.dumps(state), shared=True)
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
    extras = {name: getattr(pairs, name) for name in facts["extras"]}
    if facts["digest"] != _digest(folder, pairs.starts, pairs.lengths, extras):
        return f"{folder}: tokens, starts, lengths or {', '.join(EXTRAS)} are not what was written"
    if facts["origins"] != _array_digest(pairs.origins):
        return f"{folder / 'origins.npy'} is not what was written"
    return None


def _digest(folder: Path, starts: np.ndarray, lengths: np.ndarray, extras: Mapping[str, np.ndarray]) -> str:
    """Of token ids, order and extras."""
    digest = hashlib.sha256()
    with (folder / "tokens.bin").open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    for name, values in (("starts", starts), ("lengths", lengths)):
        digest.update(f"{name}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values, dtype="<i8").data)
    for name in sorted(extras):
        digest.update(f"{name}{extras[name].shape}{extras[name].dtype}".encode())
        digest.update(np.ascontiguousarray(extras[name]).data)
    return digest.hexdigest()


def _array_digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<i8").data).hexdigest()


def _facts_digest(facts: dict[str, Any]) -> str:
    """Of everything in pairs.json but itself."""
    others = {key: value for key, value in facts.items() if key != "facts"}
    return digest_of(others)


def open_pairs(folder: Path) -> Pairs:
    """The pairs that `prepare_pairs` left in `folder`. Raises CacheError where a file is missing or cut off."""
    try:
        facts: dict[str, Any] = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=TOKEN, mode="r")
        names = (*ARRAYS, *facts["extras"])
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        report = DropReport.from_json(facts["report"])
        of_pairs = [array for name, array in arrays.items() if name != "unlearned"]
        whole = len(tokens) == facts["tokens"] and all(len(array) == facts["pairs"] for array in of_pairs)
        sources = tuple(SourceFacts.from_json(source) for source in facts["sources"])
        pairs = Pairs(report=report, digest=facts["digest"], tokens=tokens, sources=sources, **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{folder}: prepared pairs cannot be read ({error}). Delete the folder and start again."
        ) from (error)
    if not whole:
        raise CacheError(f"{folder}: prepared pairs are not whole. Delete the folder and start again.")
    return pairs
