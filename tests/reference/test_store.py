"""The store of log-probs: what is written is read, and what is damaged, foreign or half-written never is."""

from __future__ import annotations

import json
import logging
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsdpo.data.dropped_rows import DropReport
from dsdpo.data.pairs import Pairs, open_pairs, write_index, write_tokens
from dsdpo.errors import CacheError
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.store import KEY, ShardWriter, open_store, pair_keys, read_rows
from tests.reference.test_identity import IDENTITY


def some_rows(count: int, *, seed: int = 0) -> tuple[np.ndarray, PairLogps]:
    rng = np.random.default_rng(seed)
    keys = np.array([rng.bytes(16) for _ in range(count)], dtype=KEY)
    logps = -rng.random((2, count)).astype(np.float32) * 300
    tokens = rng.integers(1, 500, (2, count))
    columns = {"chosen": logps[0], "rejected": logps[1], "chosen_tokens": tokens[0], "rejected_tokens": tokens[1]}
    return keys, PairLogps.from_numpy(columns)


def same(ours: PairLogps, theirs: PairLogps) -> bool:
    """True if all four numbers of all pairs are equal."""
    return all(np.array_equal(column, theirs.numpy()[name]) for name, column in ours.numpy().items())


def write(folder: Path, keys: np.ndarray, rows: PairLogps, *, rank: int = 0, shard_rows: int = 1024) -> None:
    writer = ShardWriter(folder, rank=rank, shard_rows=shard_rows)
    for row in range(len(keys)):
        writer.make_room(1)
        writer.append(keys[[row]], rows.take(np.array([row])))
    writer.flush()


def make_pairs(folder: Path, pairs: list[tuple[list[int], list[int], list[int]]]) -> Pairs:
    folder.mkdir()
    write_tokens(folder, [np.array(prompt + chosen + rejected) for prompt, chosen, rejected in pairs])
    lengths = np.array([[len(part) for part in pair] for pair in pairs])
    starts = np.concatenate([[0], np.cumsum(lengths.sum(1))[:-1]])
    report = DropReport(rows=len(pairs), kept=len(pairs), problems=(), truncated=0)
    write_index(folder, starts=starts, lengths=lengths, origins=np.zeros((len(pairs), 2)), report=report)
    return open_pairs(folder)


def test_round_trip_in_any_order_and_part(tmp_path: Path) -> None:
    folder = open_store(tmp_path, IDENTITY)
    keys, rows = some_rows(100)
    write(folder, keys, rows, shard_rows=8)
    assert len(list(folder.glob("part-*.parquet"))) == 13, "12 shards of 8 and one of 4"
    order = np.random.default_rng(1).permutation(100)[:60]
    unknown, _ = some_rows(5, seed=9)
    have, found = read_rows(folder, np.concatenate([keys[order], unknown, keys[order[:3]]]))
    assert have.tolist() == [True] * 60 + [False] * 5 + [True] * 3
    known, absent, repeated = found.split([60, 5, 3])
    assert same(known, rows.take(order))
    assert same(repeated, rows.take(order[:3]))
    assert same(absent, PairLogps.zeros(5))


def test_lists_have_a_number_for_each_completion(tmp_path: Path) -> None:
    """Beside pairs of the same reference, and lists of another size, none of which are taken for each other."""
    folder = open_store(tmp_path, IDENTITY)
    keys, pairs = some_rows(20)
    columns = pairs.numpy()
    rows = {}
    for size in (3, 4):
        wide = {"responses": np.arange(20 * size, dtype=np.float32).reshape(20, size) - 90.5,
                "response_tokens": np.arange(20 * size).reshape(20, size) % 7}  # fmt: skip
        rows[size] = PairLogps.from_numpy(columns | wide)
        write(folder, keys[:12], rows[size].take(np.arange(12)), shard_rows=5)
    assert read_rows(folder, keys)[0].sum() == 0
    write(folder, keys[15:], pairs.take(np.arange(15, 20)))
    for size, expected in rows.items():
        have, found = read_rows(folder, keys[::-1], group_size=size)
        assert have.tolist() == [False] * 8 + [True] * 12
        assert same(found.take(have), expected.take(np.arange(12)[::-1].copy()))
        assert found.group_size == size
    assert read_rows(folder, keys)[0].sum() == 5
    assert read_rows(folder, keys, group_size=5)[1].group_size == 5


def test_shards_hold_at_most_their_rows(tmp_path: Path) -> None:
    """With 3 + 3 rows pending, 3 more would overfill a shard of 8: it is written before they are computed."""
    folder = open_store(tmp_path, IDENTITY)
    writer = ShardWriter(folder, rank=0, shard_rows=8)
    for seed in range(3):
        writer.make_room(3)
        assert writer.pending_rows + 3 <= 8
        writer.append(*some_rows(3, seed=seed))
    assert [path.name[:16] for path in folder.glob("part-*")] == ["part-00000-00000"]
    assert writer.pending_rows == 3


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_damaged_shard_is_named_and_not_used(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_store(tmp_path, IDENTITY)
    keys, rows = some_rows(24)
    write(folder, keys, rows, shard_rows=8)
    shard = sorted(folder.glob("part-*"))[1]  # rows 8 to 15
    content = bytearray(shard.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    shard.write_bytes(content[: {"bit": None, "cut": -100, "empty": 0}[damage]])
    have, found = read_rows(folder, keys)
    assert have.tolist() == [True] * 8 + [False] * 8 + [True] * 8
    assert same(found.take(have), rows.take(have))
    assert shard.name in caplog.text
    assert "damaged" in caplog.text
    assert (folder / f"damaged-{shard.name}").exists()

    caplog.clear()
    write(folder, keys[8:16], rows.take(np.arange(8, 16)))  # computed again
    have, found = read_rows(folder, keys)
    assert have.all()
    assert same(found, rows)
    assert not caplog.text, "said once"


def test_half_written_shard_is_not_there(tmp_path: Path) -> None:
    folder = open_store(tmp_path, IDENTITY)
    keys, rows = some_rows(8)
    write(folder, keys, rows)
    [shard] = folder.glob("part-*")
    shard.rename(folder / f".{shard.name}.0123")  # as a kill between writing and renaming leaves it
    have, _ = read_rows(folder, keys)
    assert not have.any()


def test_another_reference_has_a_folder_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_store(tmp_path, IDENTITY)
    far = replace(IDENTITY, weights="f" * 32, dtype="float32")
    assert open_store(tmp_path, far) != folder
    assert not caplog.text, "another model, of which nothing could have been stored"
    caplog.clear()
    near = open_store(tmp_path, replace(IDENTITY, max_length=256))
    assert near not in (folder, open_store(tmp_path, far))
    assert folder.name in caplog.text, "the nearest one is named"
    assert "max_length (256, not 512)" in caplog.text
    assert "weights" not in caplog.text
    caplog.clear()
    assert open_store(tmp_path, replace(IDENTITY, max_length=256)) == near
    open_store(tmp_path, replace(IDENTITY, path="something else", max_length=1))
    assert not caplog.text, "nobody expects the log-probs of another model here"


@pytest.mark.parametrize("content", ["foreign", "not json", None])
def test_folder_that_is_not_what_its_name_says(
    content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_store(tmp_path, IDENTITY)
    keys, rows = some_rows(8)
    write(folder, keys, rows)
    record = folder / "identity.json"
    if content is None:
        record.unlink()
    else:
        foreign = json.dumps(replace(IDENTITY, tokenizer="e" * 32).to_json())
        record.write_text(foreign if content == "foreign" else content)
    caplog.set_level(logging.WARNING)
    beside = open_store(tmp_path, IDENTITY)
    assert beside != folder
    assert str(folder) in caplog.text
    assert ("tokenizer (cccccccccccc, not eeeeeeeeeeee)" if content == "foreign" else "cannot be read") in caplog.text
    assert not read_rows(beside, keys)[0].any()
    assert list(folder.glob("part-*")), "what is not ours is left alone"
    assert open_store(tmp_path, IDENTITY) == beside


def test_two_writers_at_once(tmp_path: Path) -> None:
    """Two runs with the same rank number, some rows the same: nothing is lost and a double counts once."""
    first, second = open_store(tmp_path, IDENTITY), open_store(tmp_path, replace(IDENTITY, path="elsewhere"))
    assert first == second
    keys, rows = some_rows(40)
    writers = [ShardWriter(folder, rank=0, shard_rows=4) for folder in (first, second)]
    for start in range(0, 20, 2):
        for writer, offset in zip(writers, (0, 10), strict=True):
            writer.make_room(2)
            part = np.arange(offset + start, offset + start + 2)
            writer.append(keys[part], rows.take(part))
    for writer in writers:
        writer.flush()
    have, found = read_rows(first, keys[:30])
    assert have.all()
    assert same(found, rows.take(np.arange(30)))


def test_reading_takes_memory_for_the_rows_asked_for(tmp_path: Path) -> None:
    """A store of 50,000 rows is 1.6 MB, of which 100 rows are wanted."""
    folder = open_store(tmp_path, IDENTITY)
    keys, rows = some_rows(50_000)
    writer = ShardWriter(folder, rank=0)
    for start in range(0, 50_000, 1000):
        writer.make_room(1000)
        writer.append(keys[start : start + 1000], rows.take(np.arange(start, start + 1000)))
    writer.flush()
    read_rows(folder, keys[:1])  # imports and caches
    tracemalloc.start()
    have, _ = read_rows(folder, keys[::500])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert have.all()
    assert peak < 400_000, "one shard at a time"


def test_nothing_infinite_is_stored(tmp_path: Path) -> None:
    folder = open_store(tmp_path, IDENTITY)
    keys, rows = some_rows(4)
    rows.rejected[2] = np.nan
    with pytest.raises(CacheError, match="not finite, such as nan"):
        write(folder, keys, rows)
    assert not list(folder.glob("part-*"))


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = open_store(tmp_path, IDENTITY)
    folder.rename(tmp_path / "gone")
    with pytest.raises(CacheError, match=r"cannot be written.*reference\.store"):
        write(folder, *some_rows(4))


def test_keys_depend_on_tokens_alone(tmp_path: Path) -> None:
    rows = [([5, 6], [7, 8], [9]), ([5], [6, 7], [8, 9]), ([5, 6], [7], [8, 9]), ([5, 6], [7, 8], [4])]
    keys = pair_keys(make_pairs(tmp_path / "one", rows))
    assert len(set(keys.tolist())) == 4, "the same tokens cut elsewhere are another pair"
    other = pair_keys(make_pairs(tmp_path / "other", [([1], [2], [3]), *reversed(rows)]))
    assert other[:0:-1].tolist() == keys.tolist(), "wherever it stands"
    assert pair_keys(make_pairs(tmp_path / "third", rows), [2, 0]).tolist() == [keys[2], keys[0]]
