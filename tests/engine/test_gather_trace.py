"""Prefetching goes on when passes with and without adapter alternate: counted, beside what happens otherwise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsdpo.data.batch import PreferenceBatch
from dsdpo.engine.lora import AdapterSwitch
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference, score_batches
from tests.adapters import continued_adapter
from tests.gathers import counting, gathered_now, hooks
from tests.ranks import run_ranks
from tests.runs import POLICIES, settings, write_json

STEPS = 5
# As DeepSpeed prefetches on real models, in proportion: some layers ahead, nothing kept.
PREFETCH = {"stage3_prefetch_bucket_size": 20000, "stage3_max_live_parameters": 1e9}


class OneOrder(Reference):
    """The reference that TRL has: the adapter switched away, and one record of gathers for everything."""

    def __init__(self, inner: Any) -> None:
        self.policy, self.adapter, self.score_tokens = inner.policy, inner.adapter, inner.score_tokens

    def score(self, window: Sequence[PreferenceBatch]) -> list[PairLogps]:
        with AdapterSwitch(self.policy.module.lm).use(self.adapter):
            return score_batches(self.policy, window, score_tokens=self.score_tokens)


def count_steps(run: dict[str, Any], keep_two: bool) -> list[dict[str, float]]:
    """What each optimizer step after the engines' start took, on this rank."""
    from dsdpo.config.loss import LossConfig
    from dsdpo.config.run import RunConfig
    from dsdpo.engine.build import device
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.run.plan import plan_run
    from dsdpo.training.metrics import Meter
    from dsdpo.training.step import train_step
    from dsdpo.training.step_loss import StepLoss

    plan = plan_run(RunConfig.model_validate(run))
    policy, reference = build_policy_and_reference(plan)
    loss_fn = StepLoss(LossConfig())
    scorer = reference if keep_two else OneOrder(reference)
    rows: list[dict[str, float]] = []
    for window in plan.training_windows(device()):
        meter = Meter()
        with counting() as events:
            train_step(policy, scorer.score(window.batches), loss_fn, window, meter)
        row = {"loss": meter.read()["loss"], "hooks": hooks(policy.module), "whole": gathered_now(policy.module)}
        rows.append({**row, **{name: events[name] for name in ("invalidated", "gathered", "late")}})
    return rows


def run_for(folder: Path, inputs: Path, lora: dict[str, Any], *, offload: bool = False) -> dict[str, Any]:
    run = settings(
        folder,
        inputs,
        reference_zero=None,
        model={"lora": lora, "gradient_checkpointing": True},
        reference={"strategy": "adapter"},
        train={"max_steps": STEPS},
        data={"shuffle": False},
    )
    zero = copy.deepcopy(POLICIES["zero3_offload" if offload else "zero3"])
    zero["zero_optimization"] |= PREFETCH
    return run | {"deepspeed": write_json(folder / "prefetch.json", zero)}


Rows = list[dict[str, float]]


@pytest.fixture(scope="module")
def adapters_off(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    """What each rank counts where a fresh adapter is switched off for the reference."""
    return run_ranks(2, count_steps, run_for(tmp_path_factory.mktemp("off"), inputs, {"r": 4}), True)


@pytest.mark.parametrize("kind", ["adapters off", "second adapter", "offload"])
def test_each_step_gathers_the_same(kind: str, adapters_off: list[Rows], inputs: Path, tmp_path: Path) -> None:
    """No record is thrown away, most parameters come ahead of time, and nothing is left behind: over five steps."""
    lora = {"path": continued_adapter(tmp_path, inputs)} if kind == "second adapter" else {"r": 4}
    if kind == "adapters off":
        [ours, other_rank] = adapters_off
    else:
        [ours, other_rank] = run_ranks(2, count_steps, run_for(tmp_path, inputs, lora, offload=kind == "offload"), True)
    assert [row["invalidated"] for row in ours] == [0] * STEPS
    settled = [{name: value for name, value in row.items() if name != "loss"} for row in ours[1:]]
    assert all(row == settled[0] for row in settled)
    assert settled[0]["hooks"] == ours[0]["hooks"]
    assert settled[0]["late"] < settled[0]["gathered"] / 2
    assert [row["gathered"] for row in other_rank] == [row["gathered"] for row in ours]


def test_one_gather_order_for_both_is_invalidated_every_step(
    adapters_off: list[Rows], inputs: Path, tmp_path: Path
) -> None:
    """What the second order is for: the same steps, the same losses, and without it far more gathers, mostly late."""
    [ours, _] = adapters_off
    [naive, _] = run_ranks(2, count_steps, run_for(tmp_path, inputs, {"r": 4}), False)
    assert [row["loss"] for row in ours] == [row["loss"] for row in naive]
    assert all(row["invalidated"] >= 1 for row in naive)
    assert sum(row["late"] for row in naive[1:]) > 3 * sum(row["late"] for row in ours[1:])
    assert sum(row["gathered"] for row in naive[1:]) > 1.2 * sum(row["gathered"] for row in ours[1:])
