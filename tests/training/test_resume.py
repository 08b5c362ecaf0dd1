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
from tests.runs import POLICIES, metrics, settings, train_here, write_json

TIMES = ("time/", "perf/", "memory/", "comm/")
MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.3}
LORA = {"model": {"lora": {"r": 4, "lora_dropout": 0.2}}, "reference_zero": None}
KINDS: dict[str, dict[str, Any]] = {
    "adapter": {**LORA, "reference": {"strategy": "adapter"}},
    "precomputed": {"reference": {"strategy": "precomputed"}},
    "moving-local": {"reference": MOVES},
    # In bfloat16 the optimizer alone has the policy's float32 values, in parts that are not the reference's.
    "moving-gathered": {"reference": MOVES, "reference_zero": "zero0", "model": {"dtype": "bfloat16"}},
    "snapshot": {
        "reference": {**MOVES, "strategy": "policy_snapshot", "ref_model_mixup_alpha": 1.0},
        "reference_zero": None,
    },
}
# What an engine saves is a matter of its stage and optimizer, what a reference saves one of its strategy, so each meets
# two of the other; but a reference that moves by parts of the policy's optimizer meets every stage.
STAGES = {
    "moving-local": ("zero1", "zero3_offload"),
    "moving-gathered": tuple(POLICIES),
    "snapshot": ("zero2", "zero3"),
    "adapter": ("zero3",),
}
CASES: dict[str, dict[str, Any]] = {
    **{f"{kind}-{stage}": {**KINDS[kind], "policy_zero": stage} for kind in STAGES for stage in STAGES[kind]},
    "separate-zero3": {},
    "moving-adapter-zero2": {**LORA, "policy_zero": "zero2", "reference": {"strategy": "adapter", **MOVES}},
    "separate-looking-ahead-zero2": {"policy_zero": "zero2", "reference": {"look_ahead_steps": 4}},
    "moving-bf16-zero3": {"model": {"dtype": "bfloat16"}, "reference": MOVES},
    "precomputed-lion-zero2": {**KINDS["precomputed"], "policy_zero": "zero2", "optimizer": {"type": "lion"}},
    "separate-sgd-zero3_offload": {"policy_zero": "zero3_offload", "optimizer": {"type": "sgd", "momentum": 0.9}},
    "separate-muon-bf16-zero1": {"policy_zero": "zero1", "optimizer": {"type": "muon"}, "model": {"dtype": "bfloat16"}},
    "adapter-muon-zero2": {**KINDS["adapter"], "policy_zero": "zero2", "optimizer": {"type": "muon"}},
    "precomputed-muon-zero3": {**KINDS["precomputed"], "policy_zero": "zero3", "optimizer": {"type": "muon"}},
    "moving-adamw_8bit-zero3": {"policy_zero": "zero3", "optimizer": {"type": "adamw_8bit"}, "reference": MOVES},
}


def run_of(folder: Path, inputs: Path, *, policy_zero: str = "zero3", **case: Any) -> dict[str, Any]:
    """Four steps, a checkpoint every second; metrics averaged over three, syncs and evaluations every third."""
    folder.mkdir(exist_ok=True)
    # As in the shipped configs, which makes it another optimizer of DeepSpeed's at stage 1 in bfloat16.
    policy = {**POLICIES[policy_zero], "data_types": {"grad_accum_dtype": "fp32"}}
    return settings(
        folder,
        inputs,
        **{
            "data": {"eval": str(inputs / "few.jsonl")},
            "train": {"max_steps": 4},
            "checkpoint": {"every_steps": 2},
            "evaluation": {"every_steps": 3, "at_start": False},
            "tracking": {"every_steps": 3},
            "deepspeed": write_json(folder / "run.json", policy),
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
    # Back to where a kill after the checkpoint of step 2 would have left it, a row cut off in its middle included.
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    run_ranks(2, train_here, {**whole, "checkpoint": {**whole["checkpoint"], "resume": "auto"}})
    assert what_was_computed(metrics(folder)) == expected_rows
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def trained(run: dict[str, Any]) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that tell of training."""
    return [row for row in metrics(Path(run["output_dir"])) if "loss" in row]


# For what does not depend on the stage; each stage and each strategy are resumed above.
CHEAP: dict[str, Any] = {"policy_zero": "zero2", "reference_zero": "zero0"}


def resumed(run: dict[str, Any], **checkpoint: Any) -> dict[str, Any]:
    return {**run, "checkpoint": {**run["checkpoint"], "resume": "auto", **checkpoint}}


def test_damaged_checkpoints_are_passed_over_and_never_deleted(inputs: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, inputs, **CHEAP, train={"max_steps": 3}, checkpoint={"every_steps": 1, "keep_last": 2})
    run_ranks(2, train_here, run)
    checkpoints = Path(run["output_dir"]) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000003"]
    newest = checkpoints / "step-000003"
    shard = next((newest / "policy").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    run_ranks(2, train_here, resumed(run))
    assert [row["step"] for row in trained(run)] == [1, 3]
    for path in checkpoints.iterdir():
        (path / "manifest.json").write_text("{")
    with pytest.raises(RankError, match=r"no checkpoint is whole(.|\n)*step-000003(.|\n)*step-000002"):
        run_ranks(2, train_here, resumed(run))
    assert len(list(checkpoints.iterdir())) == 2


def test_another_run_is_refused_by_the_names_of_what_differs(inputs: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, inputs, **CHEAP, train={"max_steps": 2}, checkpoint={"every_steps": 1})
    run_ranks(2, train_here, run)
    other = resumed({**run, "loss": {"beta": 0.5}, "tracking": {"every_steps": 1}})
    with pytest.raises(RankError, match=r"loss.beta was 0.1 and is 0.5\nput them back"):
        run_ranks(2, train_here, other)
    decayed = resumed({**run, "optimizer": {"weight_decay": 0.1}}, allow_changes=["optimizer"])
    with pytest.raises(RankError, match=r"weight_decay was 0.0 and is 0.1(.|\n)*zero in both or in neither"):
        run_ranks(2, train_here, decayed)
    other_kind = resumed({**run, "optimizer": {"type": "sgd"}}, allow_changes=["optimizer"])
    with pytest.raises(RankError, match=r"optimizer.type was adamw and is sgd, which cannot go on from"):
        run_ranks(2, train_here, other_kind)
    changed = {"learning_rate": 4 * run["optimizer"]["learning_rate"], "adam_beta1": 0.8}
    allowed = resumed(
        {**other, "optimizer": changed},
        resume=str(Path(run["output_dir"]) / "checkpoints" / "step-000001"),
        allow_changes=["loss.beta", "optimizer"],
    )
    before = trained(run)[-1]
    run_ranks(2, train_here, allowed)
    after = trained(run)[-1]
    assert after["step"] == before["step"] == 2
    assert after["learning_rate"] == 4 * before["learning_rate"]
    elsewhere = resumed(run, resume=str(tmp_path / "step-000001"))
    with pytest.raises(RankError, match="is not in"):
        run_ranks(2, train_here, elsewhere)


@pytest.mark.parametrize("strategy", ["separate", "policy_snapshot"])
def test_another_batch_size_goes_on_with_the_pairs_that_are_left(strategy: str, inputs: Path, tmp_path: Path) -> None:
    """Two steps of 8 of 20 pairs, then steps of 3: each pair once an epoch, and as many steps as two epochs take."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join((inputs / "train.jsonl").read_text().splitlines(keepends=True)[:20]))
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    run = run_of(
        tmp_path,
        inputs,
        policy_zero="zero2",
        reference_zero=None,
        data={"train": str(data), "eval": None, "cache_dir": str(tmp_path / "cache")},
        train={"num_train_epochs": 2, "max_steps": -1},
        reference={"strategy": strategy, **(moves if strategy == "policy_snapshot" else {})},
        tracking={"every_steps": 1},
        checkpoint={"every_steps": 2, "keep_last": 9},
    )
    run_ranks(2, train_here, run)
    assert [row["step"] for row in trained(run)] == [1, 2, 3, 4, 5, 6]
    step2 = str(Path(run["output_dir"]) / "checkpoints" / "step-000002")
    smaller = resumed(run, resume=step2, allow_changes=["batch.pairs_per_step"])
    run_ranks(2, train_here, {**smaller, "batch": {**run["batch"], "pairs_per_step": 3}})
    rows = trained(run)
    steps = [json.loads(line)["pair_ids"] for line in (Path(run["output_dir"]) / "pairs.jsonl").open()]
    assert [len(ids) for ids in steps] == [8, 8, 3, 1, 3, 3, 3, 3, 3, 3, 2]
    for epoch in (steps[:4], steps[4:]):
        assert sorted(pair for ids in epoch for pair in ids) == list(range(20))
    assert [row["epoch"] * 20 for row in rows] == pytest.approx([8, 16, 19, 20, 23, 26, 29, 32, 35, 38, 40])
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3 / 11), "the schedule ends with the run"


def test_another_reference_is_refused_unless_allowed(inputs: Path, tmp_path: Path) -> None:
    """The reference's weights change under an unchanged path: the digest knows."""
    from tests.runs import write_other_model

    model = tmp_path / "reference-model"
    shutil.copytree(inputs / "model", model)
    one_each = {"train": {"max_steps": 2}, "checkpoint": {"every_steps": 1}}
    run = run_of(tmp_path, inputs, **CHEAP, **one_each, reference={"path": str(model)})
    run_ranks(2, train_here, run)
    write_other_model(model)
    with pytest.raises(RankError, match=r"was trained against another reference: weights \("):
        run_ranks(2, train_here, resumed(run))
    run_ranks(2, train_here, resumed(run, allow_other_reference=True))
    identity = json.loads((Path(run["output_dir"]) / "identity.json").read_text())
    assert identity["overridden"]


def test_states_that_cannot_be_cut_anew_are_refused_before_anything_loads(tmp_path: Path) -> None:
    from dsdpo.engine.quirks.repartition import cut, why_fixed
    from dsdpo.errors import CheckpointError
    from dsdpo.training.resume import check_optimizer

    def config(kind: str, stage: int = 3, **zero: Any) -> dict[str, Any]:
        return {"optimizer": {"type": kind}, "zero_optimization": {"stage": stage, **zero}}

    old = {"world_size": 1, "stage": 3, "optimizer": "adamw_8bit"}
    nvme = config("adamw", offload_optimizer={"device": "nvme"})
    for state, now, words in [
        (old, config("adamw_8bit", 2), "zero_optimization.stage was 3 and is 2, with optimizer.type adamw_8bit, whose"),
        (old | {"world_size": 2}, config("adamw_8bit"), "ranks was 2 and is 1, with optimizer.type adamw_8bit, whose"),
        (
            old | {"partitions": cut(config("adamw_8bit"))}, config("adamw_8bit", sub_group_size=9),
            "sub_group_size was None and is 9, with optimizer.type adamw_8bit, whose",
        ),
        (
            {"world_size": 1, "stage": 3, "partitions": cut(nvme), "fixed": why_fixed(nvme)}, config("adamw"),
            "offload_optimizer.device was nvme and is None, with offload_optimizer on nvme, whose states lie outside",
        ),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{words}.*resume with the ranks and the DeepSpeed JSON that saved"):
            check_optimizer(tmp_path, state, now)
    check_optimizer(tmp_path, old | {"partitions": cut(config("adamw_8bit"))}, config("adamw_8bit"))
    for kind in ("lion", "muon"):
        check_optimizer(tmp_path, {"world_size": 2, "stage": 2}, config(kind))  # old checkpoints say no more
