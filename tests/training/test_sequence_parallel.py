"""Runs whose rows are split over ranks learn what runs do whose pairs are: losses, gradient norms, held-out metrics."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import metrics, settings, train_here, train_on
from tests.training.test_resume import weights, what_was_computed

MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 2}
# A strategy, a stage of the policy, and a loss that must know all pairs of a step: each is split in its own way.
CASES: dict[str, dict[str, Any]] = {
    "separate-zero3": {"policy_zero": "zero3"},
    "adapter-zero2": {
        "policy_zero": "zero2",
        "reference_zero": None,
        "model": {"lora": {"r": 4}},
        "optimizer": {"learning_rate": 1e-2},
        "reference": {"strategy": "adapter"},
    },
    "precomputed-zero1-bco": {
        "policy_zero": "zero1",
        "reference_zero": "zero0",
        "reference": {"strategy": "precomputed"},
        "loss": {"type": "bco_pair", "bco_running_delta": True},
    },
    "moving-zero3-ld": {"reference": {**MOVES, "ref_model_mixup_alpha": 0.3}, "loss": {"ld_alpha": 0.5}},
    "snapshot-zero2-beta": {
        "policy_zero": "zero2",
        "reference_zero": None,
        "reference": {**MOVES, "ref_model_mixup_alpha": 1.0, "strategy": "policy_snapshot"},
        "loss": {"beta_dpo_alpha": 0.5},
    },
}
TILED = {"mlp_tile_tokens": 16, "gradient_checkpointing": True}
COMPUTED = ("loss", "rewards/margins", "logps/", "lengths/", "nll/", "reference/", "pairs")


def run_of(folder: Path, inputs: Path, split: int, **case: Any) -> dict[str, Any]:
    """Three steps, two to a row of metrics, an evaluation at the end."""
    return settings(
        folder,
        inputs,
        **{
            "data": {"eval": str(inputs / "few.jsonl")},
            "train": {"max_steps": 3},
            "evaluation": {"every_steps": 3, "at_start": False},
            "tracking": {"every_steps": 2},
            "distributed": {"sequence_parallel": split},
            **case,
        },
    )


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        names = [name for name in other if name.removeprefix("eval/").startswith(COMPUTED)]
        numbers = ({name: values[name] for name in names} for values in (row, other))
        assert next(numbers) == pytest.approx(next(numbers), abs=1e-5, rel=1e-5)
        if "grad_norm" in other:
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_split_rows_train_like_split_pairs(case: str, inputs: Path, tmp_path: Path) -> None:
    rows = {}
    for split in (1, 2):
        # Each store of log-probs its own, or the second run would take the first one's.
        own = {"data": {"eval": str(inputs / "few.jsonl"), "cache_dir": str(tmp_path / f"cache{split}")}}
        tiles = {"model": TILED} if case == "separate-zero3" and split == 2 else {}
        rows[split] = train_on(2, run_of(tmp_path / f"split{split}", inputs, split, **own, **tiles, **CASES[case]))
    assert_same(rows[2], rows[1])
    assert any(abs(row.get("rewards/margins", 0.0)) > 1e-3 for row in rows[1]), "nothing was learned"
    first, second = rows[1][0], rows[2][0]
    # The rows of both ranks together are as long as the row that they share, but for a padding token each.
    assert second["perf/sharing_ratio"] == pytest.approx(first["perf/sharing_ratio"], rel=0.05)
    assert 0.0 < second["perf/padding_share"] < 0.05
    assert second["perf/imbalance"] == 1.0


def test_resumed_bit_for_bit_and_with_rows_split_otherwise(inputs: Path, tmp_path: Path) -> None:
    """As it was on two ranks; then on four, two of which share a row; then on two that share none, with MLPs in tiles,
    of which rows of different lengths have different numbers.

    A row of metrics has the second and the third step, so that what was counted up to the checkpoint between them is
    taken along.
    """
    case = {
        "train": {"max_steps": 4},
        "checkpoint": {"every_steps": 2, "keep_last": 9, "resume": "auto"},
        "tracking": {"every_steps": 3},
    }
    run = run_of(tmp_path / "0", inputs, 2, **case)
    run_ranks(2, train_here, run)
    folder = Path(run["output_dir"])
    expected, expected_weights = metrics(folder), weights(folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    run_ranks(2, train_here, run)
    assert what_was_computed(metrics(folder)) == what_was_computed(expected)
    found = weights(folder)
    assert all(torch.equal(found[name], expected_weights[name]) for name in expected_weights)
    done = folder / "checkpoints" / "step-000002"
    for index, (ranks, split) in enumerate([(4, 2), (2, 1)], start=1):
        other = run_of(tmp_path / str(index), inputs, split, **case, **({"model": TILED} if split == 1 else {}))
        shutil.copytree(done, Path(other["output_dir"]) / "checkpoints" / done.name)
        assert_same(train_on(ranks, other), expected[1:])
