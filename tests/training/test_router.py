"""A mixture of experts in whole runs: one load-balancing loss a step, however it is batched, laid out and dealt out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import demo_inputs, metrics, settings, train_here
from tests.tiny import tiny_lm

SAME = ("loss", "grad_norm", "router/aux_loss", "router/load_max", "router/load_min", "router/unused")
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (1, {"batch": {"pairs_per_micro_batch": 8}}),
    "padded": (1, {"batch": {"pairs_per_micro_batch": 3}, "data": {"layout": "padded"}}),
    "ranks": (2, {"batch": {"pairs_per_micro_batch": 2}, "model": {"gradient_checkpointing": True}}),
    "split": (2, {"batch": {"pairs_per_micro_batch": 2}, "distributed": {"sequence_parallel": 2}}),
    "off": (1, {"model": {"router_aux_loss_coef": 0.0}}),
    "own": (1, {"model": {"router_aux_loss_coef": None}}),
}


def train_all(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        train_here(run)


def test_the_load_balancing_loss_is_of_the_whole_step(tmp_path: Path) -> None:
    from tests.engines import save_lm

    inputs = demo_inputs(tmp_path / "inputs")
    lm = tiny_lm("qwen3_moe", vocab_size=200, scale=2.0, router_aux_loss_coef=5.0)
    path = save_lm(tmp_path / "moe", inputs / "model", lm)
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (ranks, sections) in WAYS.items():
        model = {"path": path, "router_aux_loss_coef": 5.0, **sections.get("model", {})}
        rest = {key: value for key, value in sections.items() if key != "model"}
        stages = {"policy_zero": "zero1", "reference_zero": "zero0"} if ranks == 1 else {}  # nothing to gather
        runs[ranks].append(settings(tmp_path / name, inputs, model=model, train={"max_steps": 3}, **stages, **rest))
    for ranks, those in runs.items():
        run_ranks(ranks, train_all, those)
    found = {name: [row for row in metrics(tmp_path / name / "run") if "loss" in row] for name in WAYS}
    assert found["whole"][0]["router/aux_loss"] > 2.0, "the experts are used evenly, so nothing is compared"
    for name in ("padded", "ranks", "split", "own"):
        for row, expected in zip(found[name], found["whole"], strict=True):
            # The first step's weights are the same; later ones have gone through Adam.
            tolerance = 1e-5 if row["step"] == 1 else 5e-4
            for metric in SAME:
                assert row[metric] == pytest.approx(expected[metric], rel=tolerance), (name, row["step"], metric)
    off, on = found["off"], found["whole"]
    assert off[0]["router/aux_loss"] == pytest.approx(on[0]["router/aux_loss"], rel=1e-6), "loads are always recorded"
    assert off[0]["grad_norm"] != pytest.approx(on[0]["grad_norm"], rel=1e-2)
    assert on[2]["router/aux_loss"] < off[2]["router/aux_loss"], "the loss does not even out the loads"
