"""`dsdpo precompute` as real processes: done twice, killed at random moments, finished by other ranks."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dsdpo.__main__ import in_process_group, main
from tests.commands.processes import Forked, finish, launcher, start_ranks
from tests.runs import settings
from tests.warm import warm_dsdpo, warm_python

SHARD_PAIRS = 16
PAIRS = 400
PROGRESS = re.compile(r"rank (\d+): (\d+) pairs scored and not yet written")


def write_run(folder: Path, inputs: Path, **sections: Any) -> Path:
    """A run file over PAIRS rows with small scoring passes, so that there is time to kill them."""
    run = settings(folder, inputs, **sections)
    data = folder / "rows.jsonl"
    data.write_text("".join((inputs / "train.jsonl").read_text().splitlines(keepends=True)[:PAIRS]))
    run["data"] |= {"train": str(data), "cache_dir": str(folder / "cache")}
    run["reference"] |= {"strategy": "precomputed", "score_tokens": 100, **sections.get("reference", {})}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def start(run: Path, world_size: int, log: Path) -> list[Forked]:
    """`dsdpo precompute` on some ranks, each with a log of its own."""
    arguments = ["precompute", str(run), "--verbose", "--shard-pairs", str(SHARD_PAIRS)]
    return start_ranks(arguments, [log.with_name(f"{log.name}-{rank}") for rank in range(world_size)])


def shards(store: Path) -> Iterator[tuple[str, int]]:
    """Name and number of rows of each shard."""
    for path in store.glob("*/part-*.parquet"):
        yield path.name, pq.read_metadata(path).num_rows


def stored(store: Path) -> dict[bytes, list[float]]:
    """Everything in a store, by key; a key may stand in several shards only if a kill had no part in it."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(store.glob("*/part-*.parquet")))
    columns = ["chosen", "rejected", "chosen_tokens", "rejected_tokens"]
    rows = {row["key"]: [row[name] for name in columns] for row in table.to_pylist()}
    assert len(rows) == table.num_rows, "no pair was stored twice"
    return rows


def kill_somewhere(run: Path, log: Path, *, after_rows: int, rng: random.Random) -> int:
    """Start two ranks, kill -9 both somewhere after `after_rows` rows are stored; the pairs lost by it."""
    store = run.parent / "store"
    processes = start(run, 2, log)
    try:
        while sum(rows for _, rows in shards(store)) < after_rows:
            assert all(process.poll() is None for process in processes), log_text(log)
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in processes]
    assert codes == [-signal.SIGKILL] * 2, "killed before it was done"
    # What each rank last said it had scored but not written; a write may have followed.
    lost = 0
    for rank in range(2):
        said = [int(count) for _, count in PROGRESS.findall(log.with_name(f"{log.name}-{rank}").read_text())]
        assert said, "it was scoring"
        assert max(said) <= SHARD_PAIRS
        lost += said[-1]
    return lost


def log_text(log: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in log.parent.glob(f"{log.name}-*"))


def test_killed_three_times_and_finished_by_one_rank(inputs: Path, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", inputs, reference={"store": str(tmp_path / "whole" / "store")})
    for process in start(whole, 2, tmp_path / "log-whole"):
        assert process.wait() == 0, log_text(tmp_path / "log-whole")
    expected = stored(tmp_path / "whole" / "store")
    assert len(expected) == PAIRS

    killed = write_run(tmp_path / "killed", inputs, reference={"store": str(tmp_path / "killed" / "store")})
    store, rng = tmp_path / "killed" / "store", random.Random(0)
    before = lost = 0
    for attempt in range(3):
        lost += kill_somewhere(killed, tmp_path / f"log-{attempt}", after_rows=before + rng.randrange(20, 80), rng=rng)
        now = sum(rows for _, rows in shards(store))
        print(f"kill {attempt + 1}: {before} rows before, {now} after, at most {lost} lost so far")
        before = now
    assert lost <= 3 * 2 * SHARD_PAIRS, "a shard for each rank and kill"
    assert before < PAIRS, "there is something left to finish"

    [last] = start(killed, 1, tmp_path / "log-last")
    assert last.wait() == 0, log_text(tmp_path / "log-last")
    said = (tmp_path / "log-last-0").read_text()
    assert f"{PAIRS} pairs, {before} known (16 scored again and found right), {PAIRS - before} scored" in said
    found = stored(store)
    assert found.keys() == expected.keys()
    keys = sorted(expected)
    assert np.array([found[key] for key in keys]) == pytest.approx(np.array([expected[key] for key in keys]), abs=1e-4)


def test_training_finds_what_was_scored(inputs: Path, tmp_path: Path) -> None:
    """Under the launcher on two ranks; then on one rank, with other learning rate, beta and loss."""
    run = write_run(tmp_path, inputs)
    first = finish([*launcher(python=warm_python()), "precompute", str(run)], limit_s=300)
    assert first.returncode == 0
    assert f"{PAIRS} pairs, 0 known, {PAIRS} scored" in first.stdout
    assert "MiB of host memory while scoring" in first.stdout
    assert not (tmp_path / "run").exists(), "nothing but the store is written"
    changes = ["--loss.type", "ipo", "--loss.beta", "0.3", "--optimizer.learning_rate", "0.01"]
    then = finish([*warm_dsdpo(), "train", str(run), *changes], limit_s=300)
    assert then.returncode == 0
    assert f"{PAIRS} pairs, {PAIRS} known (16 scored again and found right), 0 scored" in then.stdout
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    [folder] = (tmp_path / "cache" / "dsdpo" / "reference").iterdir()
    assert json.loads((folder / "identity.json").read_text()) == identity
    assert identity["weights"][:12] in then.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--reference.strategy", "separate"], "reference.strategy is separate"),
        (["--reference.sync_ref_model", "true"], "reference.sync_ref_model moves the reference"),
        (["--reference.strategy", "separate", "--reference.store", "x"], "reference.store x has no effect"),
        (["--reference.store", "/proc/none"], "reference.store: /proc/none cannot be written"),
        (["--shard-pairs", "0"], "--shard-pairs is 0"),
    ],
)
def test_contradictions(
    changes: list[str], said: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, inputs)
    capsys.readouterr()
    assert main(["precompute", str(run), *changes]) == 2
    assert not in_process_group()
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
