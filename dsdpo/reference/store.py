"""The store of log-probs: a folder per reference identity with append-only Parquet shards.

`STORE/<identity key>/identity.json` and `part-<rank>-<n>-<sha256>.parquet`, a row for each pair, keyed by a hash of its
token ids. Which data set, order, world size or loss asked for a row has no part in its key, so any run may use it. A
shard is written atomically and its name carries its checksum, so damage is detected, and runs that write at the same
time do not touch each other's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsdpo.atomic import publish, write_bytes, write_json
from dsdpo.data.pairs import TOKEN, Pairs
from dsdpo.errors import CacheError
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.identity import DECISIVE, ReferenceIdentity

log = logging.getLogger(__name__)

KEY = np.dtype("S16")  # of a pair, see `pair_keys`; compared and sorted as bytes
SHARD_ROWS = 1024  # pairs that one rank scores between writes, which is what a kill can cost
COLUMNS = pa.schema(
    [
        ("key", pa.binary(16)),
        ("chosen", pa.float32()),
        ("rejected", pa.float32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
    ]
)


def pair_keys(pairs: Pairs, ids: Sequence[int] | None = None) -> np.ndarray:
    """The keys (n,) of some pairs, or of all: a 128-bit hash of all lengths, all token ids and what is not learned."""
    chosen = np.arange(len(pairs)) if ids is None else np.asarray(ids)
    lengths = np.ascontiguousarray(pairs.lengths[chosen], dtype=TOKEN)
    starts = pairs.starts[chosen].tolist()
    keys = np.empty(len(chosen), dtype=KEY)
    for row, (start, size) in enumerate(zip(starts, lengths.sum(1, dtype=np.int64).tolist(), strict=True)):
        digest = hashlib.blake2b(lengths[row].tobytes(), digest_size=KEY.itemsize)
        # A group's own tokens stand together; a response that it borrows stands elsewhere.
        own = [(start, start + size)] if pairs.borrowed is None else pairs.stretches(int(chosen[row]))
        for first, last in own:
            digest.update(np.ascontiguousarray(pairs.tokens[first:last], dtype=TOKEN).tobytes())
        for first, last in own:
            unlearned = pairs.unlearned_ranges(first, last)
            if len(unlearned):
                digest.update(b"unlearned" + unlearned.astype("<i8").tobytes())
        keys[row] = digest.digest()
    return keys


def open_store(store: Path, identity: ReferenceIdentity) -> Path:
    """The folder for log-probs of exactly this reference, made where there is none.

    A folder of that name whose `identity.json` says anything else is left alone, and another is taken beside it.
    """
    for attempt in count():
        folder = store / (identity.key() + (f"-{attempt}" if attempt else ""))
        if not folder.exists():
            _explain_new(store, identity)
            _make_folder(folder, identity)
        found = read_identity(folder)
        if found is not None and not identity.differences(found, DECISIVE):
            return folder
        wrong = "cannot be read" if found is None else "differs in " + "; ".join(identity.differences(found, DECISIVE))
        log.warning("%s: its identity.json %s; it is not used, and log-probs go beside it", folder, wrong)
    raise AssertionError


def read_identity(folder: Path) -> ReferenceIdentity | None:
    """The identity in a folder of the store, or in a checkpoint; None where it cannot be read."""
    try:
        return ReferenceIdentity.from_json(json.loads((folder / "identity.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_rows(folder: Path, keys: np.ndarray) -> tuple[np.ndarray, PairLogps]:
    """Which of the pairs (n,) bool have a row, and the rows (zeros elsewhere).

    Memory grows with the rows asked for, not with the store. A damaged shard is set aside and warned about; a key that
    stands in several shards counts once.
    """
    distinct, place = np.unique(keys, return_inverse=True)
    have, table = np.zeros(len(distinct), dtype=bool), PairLogps.zeros(len(distinct))
    for part_keys, rows in _parts(folder) if len(distinct) else ():
        at = np.minimum(np.searchsorted(distinct, part_keys), len(distinct) - 1)
        new = (distinct[at] == part_keys) & ~have[at]
        table.put(at[new], rows.take(new))
        have[at[new]] = True
    return have[place], table.take(place)


class ShardWriter:
    """Buffers one rank's new rows and writes them a shard at a time."""

    def __init__(self, folder: Path, *, rank: int, shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.rank, self.shard_rows = folder, rank, shard_rows
        self._written = 0
        self._pending: list[tuple[np.ndarray, PairLogps]] = []

    @property
    def pending_rows(self) -> int:
        """Buffered rows, which a kill would lose."""
        return sum(len(keys) for keys, _ in self._pending)

    def append(self, keys: np.ndarray, rows: PairLogps) -> None:
        """Buffer rows."""
        self._pending.append((keys, rows))

    def make_room(self, rows: int) -> None:
        """Write the buffered rows if `rows` more would exceed a shard. Raises CacheError as `flush` does."""
        if self._pending and self.pending_rows + rows > self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows as a shard. Raises CacheError where they are not finite or cannot be written."""
        if not self._pending:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        columns = PairLogps.cat([rows for _, rows in self._pending]).numpy()
        for side in ("chosen", "rejected"):
            if not np.isfinite(columns[side]).all():
                raise CacheError(
                    "the reference gives log-probs that are not finite, such as "
                    f"{columns[side][~np.isfinite(columns[side])][0]}; none of them is stored: check its weights, and "
                    "try model.dtype float32"
                )
        table = pa.table({"key": _as_binary(keys), **columns}, schema=COLUMNS)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="none", use_dictionary=False)
        content = sink.getvalue().to_pybytes()
        name = f"part-{self.rank:05d}-{self._written:05d}-{_checksum(content)}.parquet"
        try:
            write_bytes(self.folder / name, content, shared=True)
        except OSError as error:
            raise CacheError(
                f"{self.folder}: log-probs cannot be written ({error.strerror}); shards written so far are kept: make "
                "room, or give another folder with reference.store"
            ) from error
        self._written += 1
        self._pending = []


def _parts(folder: Path) -> Iterator[tuple[np.ndarray, PairLogps]]:
    """Keys and rows of each undamaged shard, in the order of their names."""
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # another run has set it aside
        if _checksum(content) != path.stem.rsplit("-", 1)[-1]:
            _set_aside(path)
            continue
        table = pq.read_table(pa.BufferReader(content), schema=COLUMNS)
        columns = {name: table[name].to_numpy() for name in COLUMNS.names if name != "key"}
        yield _from_binary(table["key"]), PairLogps.from_numpy(columns)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"damaged-{path.name}")
    log.warning(
        "%s: damaged (its content is not what its name says); set aside as %s, and its rows are computed again",
        path,
        aside.name,
    )
    try:
        path.rename(aside)
    except OSError:  # another run was first, or the folder cannot be written: it is not read either way
        return


def _make_folder(folder: Path, identity: ReferenceIdentity) -> None:
    """Make the folder with its `identity.json` atomically; one that another process has made first is kept."""
    made = folder.with_name(f".new-{uuid.uuid4().hex}")
    try:
        made.mkdir(parents=True)
        write_json(made / "identity.json", identity.to_json())
        publish(made, folder)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise CacheError(f"reference.store: {folder} cannot be made ({error.strerror})") from error


def _explain_new(store: Path, identity: ReferenceIdentity) -> None:
    """Warn why stored log-probs of a similar reference are not used, by the fields in which the nearest differs."""
    found = [(folder.parent, read_identity(folder.parent)) for folder in store.glob("*/identity.json")]
    same_source = [
        (identity.differences(other, DECISIVE), folder)
        for folder, other in found
        if other is not None and other.path == identity.path
    ]
    if same_source:
        differences, folder = min(same_source, key=lambda entry: (len(entry[0]), entry[1]))
        log.warning(
            "no log-probs of this reference in %s; the nearest, %s, differs in %s", store, folder.name,
            "; ".join(differences),
        )  # fmt: skip


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _as_binary(keys: np.ndarray) -> pa.Array:
    data = np.ascontiguousarray(keys, dtype=KEY)
    return pa.Array.from_buffers(pa.binary(KEY.itemsize), len(data), [None, pa.py_buffer(data.tobytes())])


def _from_binary(column: pa.ChunkedArray) -> np.ndarray:
    chunk = column.combine_chunks()
    chunk = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
    return np.frombuffer(chunk.buffers()[1], dtype=KEY, count=len(chunk), offset=chunk.offset * KEY.itemsize)
