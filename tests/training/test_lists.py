"""Losses of ranked lists in whole runs, however they are batched, laid out and dealt out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import demo_inputs, metrics, settings, train_here

COLOURS = ("yellow", "red", "green", "blue")
SAME = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
HELD_OUT = 7
# Not at the start, where all rewards tie but for rounding.
EVALUATED = {"every_steps": 3, "at_start": False}
ALONE: dict[str, Any] = {"policy_zero": "zero1", "reference_zero": "zero0"}  # one rank has nothing to gather


def list_inputs(folder: Path) -> Path:
    """The demo's inputs, and lists of 2 to 4 scored completions: `lists.jsonl` and `few_lists.jsonl`."""
    demo_inputs(folder)
    for source, target, count in (("train", "lists", 40), ("test", "few_lists", HELD_OUT)):
        lines = []
        for place, line in enumerate((folder / f"{source}.jsonl").read_text().splitlines()[:count]):
            texts = [f"it is {colour} ." for colour in COLOURS[: 2 + place % 3]]
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            row = {"prompt": json.loads(line)["prompt"], "completions": completions}
            lines.append(json.dumps({**row, "scores": list(range(len(texts), 0, -1))}) + "\n")
        (folder / f"{target}.jsonl").write_text("".join(lines))
    return folder


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "packed": (1, {"batch": {"pairs_per_micro_batch": 8}}),
    "padded": (1, {"batch": {"pairs_per_micro_batch": 3}, "data": {"layout": "padded"}}),
    "adapter": (1, {"model": {"lora": {"r": 4, "target_modules": "all-linear"}}}),
    "two": (2, {"batch": {"pairs_per_micro_batch": 2}}),
}


def test_lists_have_one_loss_however_they_are_batched(tmp_path: Path) -> None:
    inputs = list_inputs(tmp_path / "inputs")
    files = {"train": str(inputs / "lists.jsonl"), "eval": str(inputs / "few_lists.jsonl"), "pairing": "list"}
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (ranks, sections) in WAYS.items():
        data = {**files, **sections.get("data", {})}
        more = {key: value for key, value in sections.items() if key != "data"}
        common = {"loss": {"type": "plackett_luce"}, "train": {"max_steps": 3}, "evaluation": EVALUATED}
        common |= ALONE if ranks == 1 else {}
        runs[ranks].append(settings(tmp_path / name, inputs, data=data, **common, **more))
    # One run with each of the other losses.
    for loss in ("best_vs_rest", "all_pairs"):
        common = {"loss": {"type": loss}, "train": {"max_steps": 1}, "evaluation": EVALUATED}
        runs[1].append(settings(tmp_path / loss, inputs, data=files, **common, **ALONE))
    for ranks, those in runs.items():
        run_ranks(ranks, train_all, those)
    found = {path.name: metrics(path / "run") for path in tmp_path.iterdir() if (path / "run").is_dir()}
    assert set(found) == {*WAYS, "best_vs_rest", "all_pairs"}
    for name in WAYS:
        assert found[name][-1]["eval/pairs"] == HELD_OUT
        assert len([row for row in found[name] if "loss" in row]) == 3
        if name == "adapter":
            continue
        for ours, theirs in zip(found[name], found["packed"], strict=True):
            for metric in theirs:
                if metric in SAME or (metric.startswith("eval/") and "calibration" not in metric):
                    tolerance = 1e-6 if ours["step"] <= 1 else 5e-5
                    assert ours[metric] == pytest.approx(theirs[metric], rel=tolerance, abs=tolerance), (name, metric)
    trained = [row for row in found["packed"] if "loss" in row]
    assert trained[-1]["loss"] < trained[0]["loss"], "nothing is learned"


def train_all(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        train_here(run)
