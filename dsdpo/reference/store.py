"""The store of log-probs: a folder per reference identity with append-only Parquet shards.

`STORE/<identity key>/identity.json` and `part-<rank>-<n>-<sha256>.parquet`, a row for each pair, keyed by a hash of its
token ids; of lists of up to K completions `lists-of-<K>-...`, with all of their log-probs in a row. Which data set,
order, world size or loss asked for a row has no part in its key, so any run may use it. A shard is written atomically
and its name carries its checksum, so damage is detected, and runs that write at the same time do not touch each
other's.
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


def columns_of(group_size: int) -> pa.Schema:
    """What a row holds: of lists of more than two responses, log-prob and tokens of each beside those of the ends."""
    if group_size <= 2:
        return COLUMNS
    lists = {"responses": pa.list_(pa.float32(), group_size), "response_tokens": pa.list_(pa.int32(), group_size)}
    return pa.schema([*COLUMNS, *lists.items()])


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


def read_rows(folder: Path, keys: np.ndarray, *, group_size: int = 2) -> tuple[np.ndarray, PairLogps]:
    """Which of the pairs, or lists of up to `group_size`, (n,) bool have a row, and the rows (zeros elsewhere).

    Memory grows with the rows asked for, not with the store. A damaged shard is set aside and warned about; a key that
    stands in several shards counts once.
    """
    distinct, place = np.unique(keys, return_inverse=True)
    have, table = np.zeros(len(distinct), dtype=bool), PairLogps.zeros_of(len(distinct), group_size=group_size)
    for part_keys, rows in _parts(folder, group_size) if len(distinct) else ():
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
        rows = PairLogps.cat([rows for _, rows in self._pending])
        columns = rows.numpy()
        for values in columns.values():
            if not np.isfinite(values).all():
                raise CacheError(
                    "the reference gives log-probs that are not finite, such as "
                    f"{values[~np.isfinite(values)][0]}; none of them is stored: check its weights, and "
                    "try model.dtype float32"
                )
        size = rows.group_size
        table = pa.table(
            {"key": _as_binary(keys), **{name: _as_column(values) for name, values in columns.items()}},
            schema=columns_of(size),
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="none", use_dictionary=False)
        content = sink.getvalue().to_pybytes()
        name = f"{_prefix(size)}-{self.rank:05d}-{self._written:05d}-{_checksum(content)}.parquet"
        try:
            write_bytes(self.folder / name, content, shared=True)
        except OSError as error:
            raise CacheError(
                f"{self.folder}: log-probs cannot be written ({error.strerror}); shards written so far are kept: make "
                "room, or give another folder with reference.store"
            ) from error
        self._written += 1
        self._pending = []


def _prefix(group_size: int) -> str:
    return "part" if group_size <= 2 else f"lists-of-{group_size}"


def _parts(folder: Path, group_size: int) -> Iterator[tuple[np.ndarray, PairLogps]]:
    """Keys and rows of each undamaged shard, in the order of their names."""
    schema = columns_of(group_size)
    for path in sorted(folder.glob(f"{_prefix(group_size)}-*.parquet")):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # another run has set it aside
        if _checksum(content) != path.stem.rsplit("-", 1)[-1]:
            _set_aside(path)
            continue
        table = pq.read_table(pa.BufferReader(content), schema=schema)
        columns = {name: _as_numpy(table[name]) for name in schema.names if name != "key"}
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
    """Warn why stored log-probs of the same weights are not used, by the fields in which the nearest differs."""
    found = [(folder.parent, read_identity(folder.parent)) for folder in store.glob("*/identity.json")]
    same_source = [
        (identity.differences(other, DECISIVE), folder)
        for folder, other in found
        if other is not None and (other.path, other.weights) == (identity.path, identity.weights)
    ]
    if same_source:
        differences, folder = min(same_source, key=lambda entry: (len(entry[0]), entry[1]))
        log.warning(
            "log-probs of this model are in %s, but the nearest, %s, differ in %s: made anew", store, folder.name,
            "; ".join(differences),
        )  # fmt: skip


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _as_column(values: np.ndarray) -> pa.Array:
    """Values (n,), or (n, K) as a list of K in each row."""
    return pa.array(values) if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """What `_as_column` was given."""
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy())
    values = np.concatenate([np.asarray(chunk.flatten()) for chunk in column.chunks])
    return values.reshape(len(column), column.type.list_size)


def _as_binary(keys: np.ndarray) -> pa.Array:
    data = np.ascontiguousarray(keys, dtype=KEY)
    return pa.Array.from_buffers(pa.binary(KEY.itemsize), len(data), [None, pa.py_buffer(data.tobytes())])


def _from_binary(column: pa.ChunkedArray) -> np.ndarray:
    chunk = column.combine_chunks()
    chunk = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
    return np.frombuffer(chunk.buffers()[1], dtype=KEY, count=len(chunk), offset=chunk.offset * KEY.itemsize)
