"""Every loss under every reference strategy: one value and gradient a step, however it is batched and dealt out.

Engines are built once for each way; all losses of its kind of rows then take turns on the same weights, which a
learning rate of 0 leaves as they are.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.config.loss import LOSSES, LossConfig
from dsdpo.data.steps import StepBatches
from dsdpo.objective.losses import LossOutput
from dsdpo.training.step_loss import StepLoss
from tests.adapters import continued_adapter
from tests.ranks import run_ranks
from tests.runs import demo_inputs, settings

NEEDED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
"""Options without which a loss is undefined, or plain DPO."""
ALONE = {
    name: {"type": name, **NEEDED.get(name, {})} for name in LOSSES if not LOSSES[name].own  # not registered by a test
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "mix": {"type": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0], "bco_running_delta": True},
    "beta-dpo": {"type": "sigmoid", "beta_dpo_alpha": 0.6},
    "wpo": {"type": "apo_zero", "use_weighting": True},
    "rpo": {"type": "sigmoid", "rpo_alpha": 0.5, "label_smoothing": 0.1},
    "confidence": {"type": "sigmoid", "label_confidence": True},
    "forward_kl": {"type": "hinge", "f_divergence_type": "forward_kl"},
    "js": {"type": "sigmoid_norm", "beta": 5.0, "f_divergence_type": "js_divergence"},
    "alpha": {"type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "aot-smoothed": {"type": "aot_unpaired", "label_smoothing": 0.1},
}
TOKENS = {"type": ["sigmoid_norm", "sft"], "ld_alpha": 0.5, "decay": 0.99, "rpo_alpha": 0.5}
KINDS = {
    "pairs": {name: loss for name, loss in ALONE.items() if LOSSES[name].rows == "pairs"} | OPTIONS,
    "rated": {name: loss for name, loss in ALONE.items() if LOSSES[name].rows == "rated"},
    "lists": {name: loss for name, loss in ALONE.items() if LOSSES[name].rows == "lists"},
    "tokens": {"tokens": TOKENS},
}
FROZEN: dict[str, tuple[int, dict[str, Any]]] = {
    # The training pass itself knows the whole step; a pass goes ahead, in which a rank scores fillers.
    "separate": (1, {"batch": {"pairs_per_micro_batch": 8}}),
    "precomputed": (1, {"batch": {"pairs_per_micro_batch": 3}, "data": {"layout": "padded"}}),
    "adapter": (2, {"batch": {"pairs_per_micro_batch": 3}}),
}
SYNC = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
NONE = {
    name: loss
    for name, loss in KINDS["pairs"].items()
    if LossConfig(**loss).reference_use != "needed" and "f_divergence_type" not in loss
}
SAME = ("loss", "grad_norm", "kl", "loss/beta", "loss/bco_delta", "rewards/chosen", "rewards/rejected", "logps/chosen",
        "logps/rejected")  # fmt: skip
Found = dict[str, list[dict[str, float]]]  # by loss, a row of metrics for each step


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's inputs with rows of each kind, and an adapter to start from that is not the base model."""
    folder = demo_inputs(tmp_path_factory.mktemp("rows"))
    found: dict[str, list[dict[str, Any]]] = {"pairs": [], "rated": [], "lists": []}
    for place, line in enumerate((folder / "train.jsonl").read_text().splitlines()[:16]):
        row = json.loads(line)
        row["chosen"][-1]["content"] += " it is so ." * (place % 3)
        known = {"margin": place % 5 / 4, "weight": 1 + place % 2, "confidence": 0.9 - place % 4 / 20}
        found["pairs"].append({**row, **known})
        side = ("chosen", "rejected")[place % 2]
        found["rated"].append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
        three = [row["chosen"], row["rejected"], [{"role": "assistant", "content": "it is green ."}]][: 2 + place % 2]
        found["lists"].append({"prompt": row["prompt"], "completions": three, "scores": [3, 2, 1][: len(three)]})
    for kind, those in found.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in those))
    continued_adapter(folder, folder)
    return folder


def run_of(folder: Path, inputs: Path, kind: str, loss: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Two steps that change nothing, of a policy with an adapter of its own."""
    data = {"train": str(inputs / f"{'pairs' if kind == 'tokens' else kind}.jsonl"), **sections.pop("data", {})}
    if kind in ("lists", "rated"):
        data |= {"pairing": "list"} if kind == "lists" else {}
    else:
        columns = {name: name for name in ("margin", "weight", "confidence")}
        data["train"] = [{"path": data["train"], "columns": columns}]
    model = {"lora": {"path": str(inputs / "adapter-1")}, **sections.pop("model", {})}
    still = {"optimizer": {"learning_rate": 0.0}, "train": {"max_steps": 2}}
    # Where nothing is gathered a step takes a tenth of the time; stages are compared elsewhere.
    cheap = {"policy_zero": "zero1", "batch": {"pairs_per_micro_batch": 8}}
    return settings(folder, inputs, data=data, model=model, loss=loss, **{**cheap, **still, **sections})


def steps_here(run: dict[str, Any], losses: dict[str, dict[str, Any]]) -> Found:
    """Each loss's steps on the same engines. A first step that is not one of all losses changes the weights, with the
    run's own loss; none of the others does. Collective."""
    from dsdpo.engine.build import device
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.training.metrics import Meter
    from dsdpo.training.step import train_step
    from tests.engines import planned

    plan = planned(run)
    policy, reference = build_policy_and_reference(plan)
    every = {name: StepLoss(LossConfig(**loss), total_steps=plan.total_steps) for name, loss in losses.items()}
    found: Found = {name: [] for name in losses}
    for step, (window, anchor) in enumerate(reference.along(plan.training_windows(device()), after=0), start=1):
        learns = step == 1 and plan.run.optimizer.learning_rate > 0
        for name, loss in {"": StepLoss(plan.run.loss)}.items() if learns else every.items():
            meter = Meter()
            loss.taken(window, train_step(policy, anchor, loss, window, meter, step=step))
            row = meter.read() | loss.metrics(step) | {"grad_norm": float(policy.get_global_grad_norm())}
            if not learns:
                found[name].append(row)
        if learns:
            policy.lr_scheduler = None
            for group in policy.optimizer.param_groups:
                group["lr"] = 0.0
        reference.after_step(step)
    return found


def same(ours: Found, theirs: Found, names: list[str], *, what: str) -> None:
    for name in names:
        for step, (mine, other) in enumerate(zip(ours[name], theirs[name], strict=True)):
            assert math.isfinite(mine["loss"])
            for metric in SAME:
                assert (metric in mine) == (metric in other), (what, name, metric)
                if metric in mine:
                    tolerance = 1e-6 if metric != "grad_norm" else 1e-5
                    expected = pytest.approx(other[metric], rel=tolerance, abs=1e-6)
                    assert mine[metric] == expected, (what, name, step, metric)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_references_give_one_loss_however_a_step_is_batched(kind: str, rows: Path, tmp_path: Path) -> None:
    """Layout, micro-batches, ranks and strategy all differ; the reference is the base model without the adapter."""
    losses, found = KINDS[kind], {}
    first = "kto" if kind == "rated" else next(iter(losses))  # which asks for more than the other
    for strategy, (ranks, sections) in FROZEN.items():
        own = {"reference": {"strategy": strategy, "adapter": "base"}, **sections}
        own["reference_zero"] = None if strategy == "adapter" else "zero0"
        run = run_of(tmp_path / strategy, rows, kind, losses[first], **own)
        found[strategy] = run_ranks(ranks, steps_here, run, losses)[0]
    for strategy in ("precomputed", "adapter"):
        same(found[strategy], found["separate"], list(losses), what=strategy)
    values = {name: found["separate"][name][-1]["loss"] for name in losses}
    assert all(row[-1]["grad_norm"] > 0 for row in found["separate"].values())
    if kind != "rated":  # whose KL is estimated as less than 0, and counts as 0
        assert len({f"{value:.9f}" for value in values.values()}) == len(values), f"losses that are alike: {values}"
    for name, row in ((name, found["separate"][name]) for name in losses):
        if name == "mix":
            assert {"loss/sigmoid", "loss/bco_pair", "loss/sft"} <= set(row[-1])
            assert row[-1]["loss/bco_delta"] != 0.0
            assert row[-1]["loss/sft"] == pytest.approx(row[-1]["nll/chosen"], rel=1e-6)
        if name == "beta-dpo":
            assert row[-1]["loss/beta"] != pytest.approx(0.1, rel=1e-6), "beta has not moved"


@pytest.mark.parametrize("kind", ["pairs", "rated", "lists"])
def test_moving_references_give_each_loss_the_same_anchor(kind: str, rows: Path, tmp_path: Path) -> None:
    """TR-DPO with alpha 1 in an engine, in an adapter and without weights: a step after the policy has moved away from
    the reference, and one after the reference has come to it."""
    losses, found = KINDS[kind], {}
    first = "kto" if kind == "rated" else next(iter(losses))
    # With so large an epsilon Adam's first step follows the gradient; otherwise rounding decides on signs.
    rate = {"learning_rate": 3.0, "adam_epsilon": 1.0}
    for name in ("separate", "adapter", "policy_snapshot"):
        own = {"reference": {"strategy": name, **SYNC}, "optimizer": rate, "train": {"max_steps": 3}}
        zero = "zero0" if name == "separate" else None
        run = run_of(tmp_path / name, rows, kind, losses[first], reference_zero=zero, **own)
        found[name] = run_ranks(1, steps_here, run, losses)[0]
    for name in ("adapter", "policy_snapshot"):
        same(found[name], found["separate"], list(losses), what=name)
    away, there = found["separate"][first]
    assert abs(away["reference/drift"]) > 1e-2, "the policy has not moved"
    assert abs(there["reference/drift"]) < 1e-5, "the reference has not moved"


def test_losses_without_a_reference_are_one_however_a_step_is_batched(rows: Path, tmp_path: Path) -> None:
    ways = {"packed": FROZEN["separate"], "padded": (2, FROZEN["precomputed"][1])}
    found = {}
    for name, (ranks, sections) in ways.items():
        loss = {"reference": {"strategy": "none"}, "reference_zero": None, **sections}
        run = run_of(tmp_path / name, rows, "pairs", {"type": "cpo"}, **loss)
        found[name] = run_ranks(ranks, steps_here, run, NONE)[0]
    same(found["padded"], found["packed"], list(NONE), what="none")
    assert {"sigmoid", "hinge", "ipo", "simpo", "cpo", "orpo", "sft"} <= set(NONE)


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
