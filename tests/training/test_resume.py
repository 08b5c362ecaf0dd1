"""N steps equal k steps, a resume and N − k steps: weights and metrics, bit for bit, for every strategy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import RankError, run_ranks
from tests.runs import demo_inputs, metrics, settings, train_here

TIMES = ("time/", "perf/", "memory/")
MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "separate-zero1": {"policy_zero": "zero1"},
    "separate-zero2": {"policy_zero": "zero2"},
    "separate-zero3": {},
    "precomputed-zero3": {"reference": {"strategy": "precomputed"}},
    "lora-dropout-zero3": {
        "model": {"lora": {"r": 4, "lora_dropout": 0.2}},
        "reference": {"strategy": "adapter"},
        "reference_zero": None,
    },
    "moving-adapter-zero2": {
        "policy_zero": "zero2",
        "model": {"lora": {"r": 4}},
        "reference": {"strategy": "adapter", **MOVES},
        "reference_zero": None,
    },
    "moving-local-zero3": {"reference": {**MOVES, "ref_model_mixup_alpha": 0.3}},
    "moving-bf16-zero3": {"model": {"dtype": "bfloat16"}, "reference": {**MOVES, "ref_model_mixup_alpha": 0.3}},
    "moving-gathered-zero3": {"reference": MOVES, "reference_zero": "zero0"},
    "snapshot-zero3": {
        "reference": {**MOVES, "strategy": "policy_snapshot", "ref_model_mixup_alpha": 1.0},
        "reference_zero": None,
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_inputs(tmp_path_factory.mktemp("inputs"))


def run_of(folder: Path, inputs: Path, **case: Any) -> dict[str, Any]:
    """Eight steps, a checkpoint every fifth, metrics averaged over three, an evaluation every fourth."""
    return settings(
        folder,
        inputs,
        **{
            "data": {"eval": str(inputs / "test.jsonl")},
            "train": {"max_steps": 8},
            "checkpoint": {"every_steps": 5},
            "evaluation": {"every_steps": 4, "at_start": False},
            "tracking": {"every_steps": 3},
            **case,
        },
    )


def what_was_computed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows without what depends on the clock."""
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(case: str, inputs: Path, tmp_path: Path) -> None:
    whole = run_of(tmp_path, inputs, **CASES[case])
    run_ranks(2, train_here, whole)
    folder = Path(whole["output_dir"])
    expected_rows, expected = what_was_computed(metrics(folder)), weights(folder)
    # Back to where a kill after the checkpoint of step 5 would have left it, a row cut off in its middle included.
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    run_ranks(2, train_here, {**whole, "checkpoint": {**whole["checkpoint"], "resume": "auto"}})
    assert what_was_computed(metrics(folder)) == expected_rows
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def resumed(run: dict[str, Any], **checkpoint: Any) -> dict[str, Any]:
    return {**run, "checkpoint": {**run["checkpoint"], "resume": "auto", **checkpoint}}


def test_damaged_checkpoints_are_passed_over_and_never_deleted(inputs: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, inputs, train={"max_steps": 3}, checkpoint={"every_steps": 1, "keep_last": 2})
    run_ranks(2, train_here, run)
    checkpoints = Path(run["output_dir"]) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000003"]
    newest = checkpoints / "step-000003"
    shard = next((newest / "policy").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    run_ranks(2, train_here, resumed(run))
    assert [row["step"] for row in metrics(Path(run["output_dir"])) if "loss" in row] == [1, 3]
    for path in checkpoints.iterdir():
        (path / "manifest.json").write_text("{")
    with pytest.raises(RankError, match=r"no checkpoint is whole(.|\n)*step-000003(.|\n)*step-000002"):
        run_ranks(2, train_here, resumed(run))
    assert len(list(checkpoints.iterdir())) == 2


def test_another_run_is_refused_by_the_names_of_what_differs(inputs: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, inputs, train={"max_steps": 2}, checkpoint={"every_steps": 1})
    run_ranks(2, train_here, run)
    other = resumed({**run, "loss": {"beta": 0.5}, "tracking": {"every_steps": 1}})
    with pytest.raises(RankError, match=r"loss.beta was 0.1 and is 0.5\nput them back"):
        run_ranks(2, train_here, other)
    run_ranks(2, train_here, {**other, "checkpoint": {**other["checkpoint"], "allow_changes": ["loss.beta"]}})
    with pytest.raises(RankError, match="was saved with ranks: 2, but this run has ranks: 1"):
        run_ranks(1, train_here, resumed(run))
    elsewhere = resumed(run, resume=str(tmp_path / "step-000001"))
    with pytest.raises(RankError, match="is not in"):
        run_ranks(2, train_here, elsewhere)


def test_another_reference_is_refused_unless_allowed(inputs: Path, tmp_path: Path) -> None:
    """The reference's weights change under an unchanged path: the digest knows."""
    from tests.runs import write_other_model

    model = tmp_path / "reference-model"
    shutil.copytree(inputs / "model", model)
    run = run_of(
        tmp_path, inputs, train={"max_steps": 2}, checkpoint={"every_steps": 1}, reference={"path": str(model)}
    )
    run_ranks(2, train_here, run)
    write_other_model(model)
    with pytest.raises(RankError, match=r"was trained against another reference: weights \("):
        run_ranks(2, train_here, resumed(run))
    run_ranks(2, train_here, resumed(run, allow_other_reference=True))
    identity = json.loads((Path(run["output_dir"]) / "identity.json").read_text())
    assert identity["overridden"]
