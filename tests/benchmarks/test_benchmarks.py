"""The benchmarks run, take turns, count what they say they count, and their page shows the results that are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import report
from benchmarks.harness.common import RESULTS
from benchmarks.harness.compare import loss_difference, speedups
from benchmarks.harness.inputs import mixed_lengths, random_rows, same_lengths
from benchmarks.harness.processes import Side, run_sides
from benchmarks.packing import OURS, PADDED, SORTED, in_fours
from tests.conftest import ROOT


def run_benchmark(name: str, out: Path, *options: str) -> dict[str, Any]:
    """The result file of a benchmark's own command."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    for table in result["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert all(" | ".join(row) in done.stdout for row in table["rows"]), "the table is printed too"
    assert str(ROOT) not in result["command"]
    assert result["machine"]["cores"]
    assert result["versions"]["torch"]
    return result


def test_packing_counts_positions(tmp_path: Path) -> None:
    result = run_benchmark("packing", tmp_path / "packing.json", "--rounds", "2", "--steps", "2")
    measured = result["measured"]
    assert len(measured) == 8
    for ratios in measured.values():
        assert len(ratios) == 2
        for ratio in ratios:
            # No plan computes less than the useful tokens, but for the last one of each response.
            assert 0.97 < ratio[OURS] < ratio[SORTED] < ratio[PADDED]


def test_micro_batches_of_four_are_dealt_in_turn() -> None:
    dealt = in_fours(np.arange(16), 2)
    assert dealt == (((0, 1, 2, 3), (8, 9, 10, 11)), ((4, 5, 6, 7), (12, 13, 14, 15)))


@pytest.mark.nightly
def test_precompute_is_timed_against_its_forwards(tmp_path: Path) -> None:
    options = ("--tiny", "--pairs", "64", "--rounds", "2", "--ranks", "1")
    result = run_benchmark("precompute", tmp_path / "precompute.json", *options)
    [rank] = result["measured"]["1 ranks"]
    assert rank["pairs"] == 64
    assert len(rank["rounds"]) == 2
    for passes in rank["rounds"]:
        assert set(passes) == {"precompute", "bare"}
        assert all(clock > 0 for times in passes.values() for clock in times.values())


@pytest.mark.nightly
def test_a_step_is_split_and_held_against_the_peak(tmp_path: Path) -> None:
    options = ("--tiny", "--rounds", "1", "--steps", "2", "--pairs-per-step", "8")
    result = run_benchmark("step_split", tmp_path / "split.json", *options)
    split, targets = result["tables"]
    assert {"matrix products", "output head", "optimizer", "host", "unclassified"} <= {row[0] for row in split["rows"]}
    assert targets["rows"][0][2] == "< 5 %"
    (measured,) = (value for name, value in result["measured"].items() if name != "peak")
    assert len(measured["steps"]) == 2
    assert len(measured["plain_s"]) == 1


@pytest.mark.nightly
def test_a_start_is_split_into_its_parts(tmp_path: Path) -> None:
    result = run_benchmark("start", tmp_path / "start.json", "--shape", "demo", "--rounds", "1")
    for way in ("transformers", "own-parts"):
        [start] = result["measured"]["starts"][way]
        whole, _ = start.pop("command to first step"), start.pop("the same, CPU time of all ranks")
        assert len(start) == 9
        assert all(seconds > 0 for seconds in start.values())
        assert sum(start.values()) == pytest.approx(whole, rel=0.05)


@pytest.mark.nightly
def test_saves_are_timed_beside_steps(tmp_path: Path) -> None:
    result = run_benchmark("saves", tmp_path / "saves.json", "--tiny", "--rounds", "2", "--steps", "3")
    *rounds, memory = result["measured"]["1 ranks"][0]["rounds"]
    assert len(rounds) == 2
    for found in rounds:
        assert found["at once"]["stall"]["wall_s"] > 0
        assert found["background"]["stall"]["wall_s"] > found["background"]["copy"]["wall_s"] > 0
        assert len(found["none"]["steps"]) == 3
    assert memory["memory"]["said_mib"] > 0


@pytest.mark.nightly
def test_the_bare_loop_takes_the_steps_of_the_run(tmp_path: Path) -> None:
    options = ("--tiny", "--ranks", "1", "--rounds", "2", "--steps", "2", "--pairs-per-step", "8")
    result = run_benchmark("overhead", tmp_path / "overhead.json", *options)
    whole, bare = (result["measured"]["1 ranks"][name] for name in ("dsdpo train", "bare loop"))
    assert len(whole["turns"]) == len(bare["turns"]) == 2
    assert bare["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert len(set(bare["losses"])) > 2


def test_sides_take_turns(tmp_path: Path) -> None:
    rounds, steps, warmup = 2, 2, 1
    total = warmup + rounds * steps
    sides = [
        Side(
            name, "tests.benchmarks.steps", (str(seconds), str(total), str(tmp_path / f"{name}.json")), tmp_path / name
        )
        for name, seconds in (("slow", 0.4), ("fast", 0.1))
    ]
    measured = run_sides(sides, rounds=rounds, steps=steps, warmup=warmup)
    slow, fast = (json.loads((tmp_path / f"{name}.json").read_text())[warmup:] for name in ("slow", "fast"))
    for begins, ends in slow:
        assert all(other_ends < begins or other_begins > ends for other_begins, other_ends in fast)
    assert measured["slow"].losses == [1.0 / step for step in range(1, total + 1)]
    assert loss_difference(measured["slow"], measured["fast"]) == 0.0
    assert len(speedups(measured["slow"], measured["fast"], "wall_s")) == rounds
    assert all(turn["wall_s"] >= steps * 0.4 for turn in measured["slow"].turns)
    assert all(turn["cpu_s"] < turn["wall_s"] for turn in measured["slow"].turns), "asleep is no CPU time"


def test_a_side_that_fails_is_reported(tmp_path: Path) -> None:
    broken = Side("broken", "tests.benchmarks.steps", ("no number", "1", str(tmp_path / "x")), tmp_path / "broken")
    with pytest.raises(RuntimeError, match=r"(?s)broken: ended with code 1.*no number"):
        run_sides([broken], rounds=1, steps=1)


def test_rows_have_the_lengths_asked_for() -> None:
    lengths = np.concatenate([same_lengths(2, 5, 3), mixed_lengths(3, prompt=20, response=9, longest=40)])
    assert ((lengths[:, 0] + lengths[:, 1:].max(1)) <= 40).all()
    for row, (prompt, chosen, rejected) in zip(random_rows(lengths, 64), lengths.tolist(), strict=True):
        assert len(row["prompt"].split()) == prompt
        assert len(row["chosen"].split()) == chosen - 1  # the end of text is put after it
        assert len(row["rejected"].split()) == rejected - 1


def test_the_page_shows_the_results_that_are_kept() -> None:
    page = report.README.read_text(encoding="utf-8")
    assert report.with_results(page) == page, "run python -m benchmarks.report"
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert path.stem.startswith(result["benchmark"]), "a script's parts may be kept apart, as in vs_trl_one.json"
        assert f"`{result['command']}`" in page


def test_a_side_that_hangs_is_ended(tmp_path: Path) -> None:
    slow = Side("slow", "tests.benchmarks.steps", ("60", "9", str(tmp_path / "x")), tmp_path / "slow", limit_s=0.5)
    with pytest.raises(RuntimeError, match="slow: not done in"):
        run_sides([slow], rounds=1, steps=1)
