"""Losses of single rated completions, in whole runs: the same however the rows are batched, laid out and dealt out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import demo_inputs, metrics, settings, train_here

HELD_OUT, DESIRABLE = 11, 5


def rated_inputs(folder: Path) -> Path:
    """The demo's inputs, and its rows as one completion with a label each: `rated.jsonl`, and `few_rated.jsonl`."""
    demo_inputs(folder)
    for source, target, count in (("train", "rated", None), ("test", "few_rated", HELD_OUT)):
        lines = []
        for place, line in enumerate((folder / f"{source}.jsonl").read_text().splitlines()[:count]):
            row, good = json.loads(line), place % 2 == 1
            completion = row["chosen" if good else "rejected"]
            lines.append(json.dumps({"prompt": row["prompt"], "completion": completion, "label": good}) + "\n")
        (folder / f"{target}.jsonl").write_text("".join(lines))
    return folder


def rated_run(folder: Path, inputs: Path, loss: str, **sections: Any) -> dict[str, Any]:
    data = {"train": str(inputs / "rated.jsonl"), "eval": str(inputs / "few_rated.jsonl"), **sections.pop("data", {})}
    batch = sections.pop("batch", {"pairs_per_micro_batch": 8})
    evaluation = {"every_steps": 3, "at_start": False, "length_buckets": [12]}
    # One rank has nothing to gather; what two do at stage 3 is compared with it.
    stages = {"policy_zero": "zero1", "reference_zero": "zero0"}
    common = {"train": {"max_steps": 3}, "evaluation": evaluation, "batch": batch}
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 0}
    options = {"type": loss, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    return settings(folder, inputs, loss=options, data=data, optimizer=optimizer, **common, **{**stages, **sections})


PADDED = {"data": {"layout": "padded"}, "batch": {"pairs_per_micro_batch": 3}}
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "kto": ("kto", {}),
    "kto-padded-precomputed": ("kto", {**PADDED, "reference": {"strategy": "precomputed"}}),
    "kto-adapter": ("kto", {"model": {"lora": {"r": 4, "target_modules": "all-linear"}}}),
    "kto-trdpo": (
        "kto",
        {"reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}},
    ),
    "apo": ("apo_zero_unpaired", {}),
    "apo-padded-precomputed": ("apo_zero_unpaired", {**PADDED, "reference": {"strategy": "precomputed"}}),
}
TWO = {"kto": "kto", "apo": "apo_zero_unpaired"}


def test_rated_completions_have_one_loss_however_they_are_batched(tmp_path: Path) -> None:
    inputs = rated_inputs(tmp_path / "inputs")
    alone = [rated_run(tmp_path / name, inputs, loss, **more) for name, (loss, more) in ALONE.items()]
    small = {"batch": {"pairs_per_micro_batch": 2}, "policy_zero": "zero3", "reference_zero": "zero3"}
    two = [rated_run(tmp_path / f"{name}-two", inputs, loss, **small) for name, loss in TWO.items()]
    run_ranks(1, train_all, alone)
    run_ranks(2, train_all, two)
    found = {path.name: metrics(path / "run") for path in tmp_path.iterdir() if (path / "run").is_dir()}
    assert set(found) == {*ALONE, *(f"{name}-two" for name in TWO)}
    for name, rows in found.items():
        trained, held_out = [row for row in rows if "loss" in row], rows[-1]
        assert len(trained) == 3
        # Nothing has been learned: a log-ratio of 0 is on neither side, and each completion costs half its weight.
        first = trained[0]
        assert first["rewards/ties"] == 1.0
        assert 0.25 < first["loss"] < 0.75
        assert (held_out["eval/pairs"], held_out["eval/desirable"]) == (HELD_OUT, DESIRABLE)
        assert held_out["eval/rewards/margins"] == pytest.approx(
            held_out["eval/rewards/chosen"] - held_out["eval/rewards/rejected"]
        )
        lengths = [f"eval/length/{bucket}" for bucket in ("1-12", "13-") if f"eval/length/{bucket}/pairs" in held_out]
        assert sum(held_out[f"{bucket}/pairs"] for bucket in lengths) == HELD_OUT
        loss = sum(held_out[f"{bucket}/loss"] * held_out[f"{bucket}/pairs"] for bucket in lengths) / HELD_OUT
        assert loss == pytest.approx(held_out["eval/loss"], abs=0.05)  # each bucket has an estimate of its own
        assert any(key.startswith("length/") and key.endswith("rewards/margins") for row in trained for key in row)
        like = name.split("-")[0]
        if name.endswith(("padded-precomputed", "two")):
            for ours, theirs in zip(rows, found[like], strict=True):
                for metric in theirs:
                    if metric in SAME or metric.startswith("eval/"):
                        tolerance = 1e-6 if ours["step"] == 1 else 5e-5
                        assert ours[metric] == pytest.approx(theirs[metric], rel=tolerance, abs=tolerance), (
                            name, metric, ours["step"],
                        )  # fmt: skip
    assert max(row["kl"] for row in found["kto"] if "kl" in row) > 0.0, "the estimate has not been of any effect"
    assert {row["kl"] for row in found["apo"] if "kl" in row} == {0.0}
    # After the sync at step 2 the reference is the policy again.
    assert found["kto-trdpo"][2]["rewards/ties"] == 1.0
    assert found["kto"][2]["rewards/ties"] < 1.0


SAME = ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
        "logps/rejected", "lengths/chosen", "nll/chosen")  # fmt: skip


def train_all(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        train_here(run)
