"""Losses of the whole step: the same whatever the micro-batches, the layout and the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.config.loss import LossConfig
from dsdpo.data.steps import StepBatches
from dsdpo.objective.losses import LossOutput
from dsdpo.training.step_loss import StepLoss
from tests.ranks import run_ranks
from tests.runs import demo_inputs, settings, train_here

LOSSES: dict[str, dict[str, Any]] = {
    "aot": {"type": "aot"},
    "aot_unpaired": {"type": "aot_unpaired", "label_smoothing": 0.1},
    "beta_dpo": {"type": "sigmoid", "beta_dpo_alpha": 0.6},
    "mix": {"type": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0], "bco_running_delta": True},
    "tokens": {"type": "sigmoid_norm", "beta": 5.0, "ld_alpha": 0.5, "decay": 0.99, "rpo_alpha": 0.5},
    "weighted": {"type": "apo_zero", "use_weighting": True},
}
WAYS: list[tuple[int, dict[str, Any]]] = [
    (1, {"batch": {"pairs_per_micro_batch": 8}}),  # the training pass itself knows the whole step
    (1, {"batch": {"pairs_per_micro_batch": 3}, "data": {"layout": "padded"}}),
    (2, {"batch": {"pairs_per_micro_batch": 2}}),
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_has_one_loss_however_it_is_batched(world_size: int, tmp_path: Path) -> None:
    inputs = demo_inputs(tmp_path / "inputs")
    runs = {
        f"{name}-{place}": settings(
            tmp_path / f"{name}-{place}", inputs, loss=loss, train={"max_steps": 3}, **sections, evaluation={}
        )
        for name, loss in LOSSES.items()
        for place, (ranks, sections) in enumerate([WAYS[0], *(way for way in WAYS[1:] if way[0] == world_size)])
        if place or world_size == 1 or ranks == world_size
    }
    if world_size == 2:
        # What one rank found comes from a pool of one.
        alone = {name: settings(tmp_path / f"{name}-alone", inputs, loss=loss, train={"max_steps": 3}, **WAYS[0][1])
                 for name, loss in LOSSES.items()}  # fmt: skip
        run_ranks(1, train_all, list(alone.values()))
    run_ranks(world_size, train_all, list(runs.values()))
    for name in LOSSES:
        expected = rows(tmp_path / (f"{name}-alone" if world_size == 2 else f"{name}-0"))
        for place in (1,):
            found = rows(tmp_path / f"{name}-{place}")
            assert len(found) == 3
            for ours, theirs in zip(found, expected, strict=True):
                for metric in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
                    # The first step's weights are the same; later ones have gone through Adam.
                    tolerance = 1e-6 if ours["step"] == 1 else 2e-5
                    assert ours[metric] == pytest.approx(theirs[metric], rel=tolerance, abs=tolerance), (name, metric)
            if name == "mix":
                assert {"loss/sigmoid", "loss/bco_pair", "loss/sft", "loss/bco_delta"} <= set(found[-1])
                assert found[-1]["loss/sft"] == pytest.approx(found[-1]["nll/chosen"], rel=1e-6)
            if name == "beta_dpo":
                assert found[-1]["loss/beta"] != pytest.approx(0.1, rel=1e-6), "beta has not moved"


def train_all(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        train_here(run)


def rows(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "loss" in row]


def test_a_running_mean_goes_on_from_where_it_was() -> None:
    import torch

    from tests.tiny import random_batch

    window = StepBatches(
        (random_batch(2),), pairs=2, tokens=80, epoch=0.5, pair_ids=np.arange(2), lengths=np.full((2, 3), 10),
        loads=(80,), computed=80, padding=0,
    )  # fmt: skip
    loss = StepLoss(LossConfig(type="bco_pair", bco_running_delta=True))
    output = LossOutput(torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 4.0]))
    loss.taken(window, [output])
    # (1 + 2 - 1 + 4) / 4 responses
    assert loss.held_out(2).bco_delta == 1.5
    resumed = StepLoss(LossConfig(type="bco_pair", bco_running_delta=True), means=dict(loss.means))
    assert resumed.held_out(2).bco_delta == 1.5
    assert resumed.metrics(2) == {"loss/bco_delta": 1.5}
