"""Rows to token ids, a thousand rows at a time, on a pool of processes.

Each finished chunk is a file of its own, so that a preparation that is killed goes on where it was; which rows are in a
chunk depends on nothing but the sources, so the result is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import sys
import threading
import zipfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from dsdpo.atomic import replacing
from dsdpo.console import is_quiet
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.encode import Encoded, Encoder, encode_examples
from dsdpo.data.examples import to_examples
from dsdpo.data.pairs import NO_RANGES, TOKEN
from dsdpo.data.sources import Source, read_rows
from dsdpo.errors import DataError

log = logging.getLogger(__name__)

CHUNK_ROWS = 1000
POOL_FROM = 4  # chunks; fewer are encoded in this process, as starting others takes seconds
ARRAYS = (
    "rows", "tokens", "lengths", "unlearned", "digests", "margins", "weights", "confidences", "scores", "truncated",
)  # fmt: skip

NumberedRow = tuple[int, str, Any]  # number in its source, place for a person, the row


@dataclass(frozen=True)
class Chunk:
    """What became of some consecutive rows of one source: m examples and the bad rows."""

    source: int  # index into the sources
    rows: np.ndarray  # (m,) int64, row of each example in its source
    tokens: np.ndarray  # (M,) int32: prompt and responses of each example
    lengths: np.ndarray  # (m, 1 + n) int32
    unlearned: np.ndarray  # (u, 2) int64, ascending ranges of `tokens`
    digests: np.ndarray  # (m,) uint64 of an example's ids, to find duplicates
    margins: np.ndarray  # (m,) float32, NaN where a row has none
    weights: np.ndarray  # (m,) float32, NaN where a row has none
    confidences: np.ndarray  # (m,) float32, NaN where a row has none
    scores: np.ndarray  # (m, n) float32, NaN where a row has none, and where it has no such response
    truncated: np.ndarray  # (m,) bool, a response was cut
    notes: dict[str, int]  # examples by what is to be said of them
    bad: list[tuple[int, str, str, str]]  # row, place, kind and detail of each bad row

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        facts = {"source": self.source, "notes": self.notes, "bad": self.bad}
        arrays = {name: getattr(self, name) for name in ARRAYS}
        with replacing(path, shared=True) as file:
            np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> Chunk:
        """The chunk that `save` wrote. Raises OSError, ValueError, KeyError or BadZipFile where it is damaged."""
        with np.load(path) as file:
            facts = json.loads(file["facts"].tobytes())
            facts["bad"] = [tuple(bad) for bad in facts["bad"]]
            return cls(**facts, **{name: file[name] for name in ARRAYS})


def encode_rows(rows: Sequence[NumberedRow], index: int, source: Source, encoder: Encoder) -> Chunk:
    """The chunk of these rows. Raises DataError for messages where there is no chat template to render them."""
    examples: list[tuple[int, str, dict[str, Any]]] = []
    bad: list[tuple[int, str, str, str]] = []
    for number, place, row in rows:
        try:
            found = to_examples(row, source.rules)
            _check_unicode(found)
        except BadRow as problem:
            bad.append((number, place, problem.kind, problem.detail))
            continue
        if isinstance(found[0]["prompt"], list) and encoder.tokenizer.chat_template is None:
            raise DataError(
                f"{source.key}: {place} holds messages, but the tokenizer has no chat template. Give one with "
                "model.chat_template, use a tokenizer that has one, or give rows whose fields are text."
            )
        examples += [(number, place, example) for example in found]
    encoded = encode_examples([example for _, _, example in examples], encoder)
    good: list[tuple[int, dict[str, Any], Encoded]] = []
    for (number, place, example), result in zip(examples, encoded, strict=True):
        if isinstance(result, BadRow):
            bad.append((number, place, result.kind, result.detail))
        else:
            good.append((number, example, result))
    return _joined(index, good, sorted(bad))


def _check_unicode(examples: list[dict[str, Any]]) -> None:
    """Raises BadRow where examples hold half a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(examples, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow("wrong_type", f"not valid Unicode: {error.reason}") from error


def _joined(source: int, good: Sequence[tuple[int, dict[str, Any], Encoded]], bad: list[Any]) -> Chunk:
    """The chunk of some encoded examples."""
    parts, lengths, unlearned, digests, notes = [], [], [], [], Counter[str]()
    before = 0
    for _, _, one in good:
        responses = one.responses
        ids = np.array([*one.prompt, *(token for response in responses for token in response)], dtype=TOKEN)
        sizes = [len(one.prompt), *map(len, responses)]
        masks = [True] * sizes[0]
        for response, learned in zip(responses, one.learned or [None] * len(responses), strict=True):
            masks += [True] * len(response) if learned is None else learned
        ranges = _false_ranges(masks)
        digest = hashlib.blake2b(ids.tobytes() + repr((sizes, ranges.tolist())).encode(), digest_size=8)
        parts.append(ids)
        lengths.append(sizes)
        unlearned.append(ranges + before)
        digests.append(int.from_bytes(digest.digest(), "little"))
        notes.update(one.notes)
        before += len(ids)
    widest = max(map(len, lengths), default=2)
    scores = np.full((len(good), widest - 1), np.nan, dtype=np.float32)
    for index, (_, example, _) in enumerate(good):
        scores[index, : len(example.get("scores", ()))] = example.get("scores", ())
    return Chunk(
        source=source,
        rows=np.array([number for number, _, _ in good], dtype=np.int64),
        tokens=np.concatenate([np.zeros(0, TOKEN), *parts]),
        lengths=np.array([[*sizes, *[0] * (widest - len(sizes))] for sizes in lengths], np.int32).reshape(-1, widest),
        unlearned=np.concatenate([NO_RANGES, *unlearned]),
        digests=np.array(digests, dtype=np.uint64),
        margins=np.array([example.get("margin", np.nan) for _, example, _ in good], dtype=np.float32),
        weights=np.array([example.get("weight", np.nan) for _, example, _ in good], dtype=np.float32),
        confidences=np.array([example.get("confidence", np.nan) for _, example, _ in good], dtype=np.float32),
        scores=scores,
        truncated=np.array([one.truncated for _, _, one in good], dtype=bool),
        notes=dict(notes),
        bad=bad,
    )


def _false_ranges(mask: Sequence[bool]) -> np.ndarray:
    """(u, 2) int64, [start, end) of each stretch of False."""
    if all(mask):
        return NO_RANGES
    edges = np.flatnonzero(np.diff(np.r_[True, np.asarray(mask, dtype=bool), True].astype(np.int8)))
    return edges.reshape(-1, 2).astype(np.int64)


@dataclass
class Progress:
    """What a preparation has done so far."""

    rows: dict[int, int] = field(default_factory=dict)  # rows of each source, all read once it is done
    reused: int = 0  # rows of chunks that an earlier preparation had finished


def make_chunks(
    folder: Path,
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    used: Mapping[int, np.ndarray],
    processes: int,
    label: str,
) -> tuple[list[Path], Progress]:
    """Encode all rows of all sources into files of `folder`, of which those that are there are kept.

    `used` says of some sources which of their rows are wanted (bool); of the others all are. Raises DataError.
    """
    progress, paths = Progress(), list[Path]()
    jobs = _missing_chunks(folder, sources, used, progress, paths)
    every = 0.5 if sys.stderr.isatty() else 15.0  # a log file wants few lines
    total = None if used else estimated_rows(sources)
    with tqdm(
        desc=label, total=total, unit=" rows", mininterval=every, dynamic_ncols=True, delay=2.0, disable=is_quiet()
    ) as bar:
        head = list(islice(jobs, POOL_FROM))
        if processes > 1 and len(head) == POOL_FROM:
            _encode_on_pool(chain(head, jobs), sources, encoder, processes, bar)
        else:
            _encode_here(chain(head, jobs), sources, encoder, bar)
        bar.total = sum(progress.rows.values())
    if progress.reused:
        log.warning("%d rows were encoded by a preparation that was ended, and are not encoded again", progress.reused)
    return paths, progress


Job = tuple[Path, int, list[NumberedRow]]


def _missing_chunks(
    folder: Path, sources: Sequence[Source], used: Mapping[int, np.ndarray], progress: Progress, paths: list[Path]
) -> Iterator[Job]:
    """The chunks that have no file yet; all chunks' files are noted in `paths`."""

    def job(index: int, rows: list[NumberedRow]) -> Iterator[Job]:
        path = folder / f"chunk-{len(paths):06d}.npz"
        paths.append(path)
        if _is_whole(path):
            progress.reused += len(rows)
        else:
            yield path, index, rows

    for index, source in enumerate(sources):
        rows: list[NumberedRow] = []
        number = -1
        for number, (place, row) in enumerate(read_rows(source)):
            if index not in used or used[index][number]:
                rows.append((number, place, row))
            if len(rows) == CHUNK_ROWS:
                yield from job(index, rows)
                rows = []
        if rows:
            yield from job(index, rows)
        progress.rows[index] = number + 1


def _is_whole(path: Path) -> bool:
    """Whether a chunk's file can be read; one that cannot is removed."""
    try:
        Chunk.load(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
        return False
    return True


def _encode_here(jobs: Iterator[Job], sources: Sequence[Source], encoder: Encoder, bar: Any) -> None:
    for path, index, rows in jobs:
        encode_rows(rows, index, sources[index], encoder).save(path)
        bar.update(len(rows))


def _encode_on_pool(jobs: Iterator[Job], sources: Sequence[Source], encoder: Encoder, processes: int, bar: Any) -> None:
    """Encode on other processes, of which none inherits this one's threads and devices."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, type(encoder.tokenizer).__module__])
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(pickle.dumps((list(sources), encoder)),)
    )
    pending: deque[tuple[Future[None], int]] = deque()
    try:
        for path, index, rows in jobs:
            pending.append((pool.submit(_encode_in_worker, path, index, rows), len(rows)))
            while len(pending) > 2 * processes or (pending and pending[0][0].done()):
                _finish(pending, bar)
        while pending:
            _finish(pending, bar)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenizes was ended, perhaps for want of memory; what was done is kept: start again, with "
            f"data.dataset_num_proc below {processes}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(pending: deque[tuple[Future[None], int]], bar: Any) -> None:
    """Wait for the oldest chunk and raise what went wrong with it."""
    future, rows = pending.popleft()
    future.result()
    bar.update(rows)


_worker: tuple[list[Source], Encoder] | None = None


def _start_worker(payload: bytes) -> None:
    """Get ready in a new process, which ends when its parent does."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core of its own
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
    with suppress(ImportError):  # where classes of tokenizers that come with a model are found
        from transformers.dynamic_module_utils import init_hf_modules

        init_hf_modules()
    _worker = pickle.loads(payload)


def _encode_in_worker(path: Path, index: int, rows: list[NumberedRow]) -> None:
    assert _worker is not None
    sources, encoder = _worker
    encode_rows(rows, index, sources[index], encoder).save(path)


def estimated_rows(sources: Sequence[Source]) -> int | None:
    """About how many rows the sources have, for a bar; None where that takes reading them."""
    total = 0.0
    for path in (path for source in sources for path in source.files):
        name = path.name.lower()
        if name.endswith(".parquet"):
            with suppress(Exception):  # a damaged file is found when it is read
                total += pq.read_metadata(path).num_rows
        elif name.endswith(".jsonl"):
            with path.open("rb") as file:
                head = file.readlines(1 << 20)
            total += path.stat().st_size * len(head) / max(1, sum(map(len, head)))
        else:
            return None
    return round(total) if all(source.files for source in sources) else None
