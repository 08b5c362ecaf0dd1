"""Losses against TRL's values, and against numbers derived by hand."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from dsdpo.config.loss import LossConfig
from dsdpo.objective.logps import PairLogps
from dsdpo.objective.losses import LOSSES, make_loss


def logps(chosen: float, rejected: float, tokens: tuple[int, int] = (2, 4)) -> PairLogps:
    return PairLogps(
        torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([tokens[0]]), torch.tensor([tokens[1]])
    )


# h = (-1 + 3) - (-6 + 4) = 4; beta 0.5 -> 2. Per token: (2 / 2) - (-2 / 4) = 1.5.
POLICY, REFERENCE = logps(-1.0, -6.0), logps(-3.0, -4.0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {}, math.log(1 + math.exp(-2))),
        ("sigmoid", {"label_smoothing": 0.25}, 0.75 * math.log(1 + math.exp(-2)) + 0.25 * math.log(1 + math.exp(2))),
        ("hinge", {}, 0.0),
        ("ipo", {}, (1.5 - 1.0) ** 2),
    ],
)
def test_values_by_hand(name: str, options: dict[str, float], expected: float) -> None:
    output = make_loss(name, beta=0.5, **{"label_smoothing": 0.0, **options})(POLICY, REFERENCE)
    assert output.losses.item() == pytest.approx(expected, abs=1e-6)
    assert output.chosen_rewards.item() == pytest.approx(0.5 * 2)
    assert output.rejected_rewards.item() == pytest.approx(0.5 * -2)


def test_hinge_with_a_small_margin() -> None:
    assert make_loss("hinge", beta=0.1)(POLICY, REFERENCE).losses.item() == pytest.approx(1 - 0.4)


@pytest.mark.parametrize("name", LOSSES)
def test_policy_equal_to_reference(name: str) -> None:
    output = make_loss(name, beta=0.1, label_smoothing=0.0)(POLICY, POLICY)
    assert output.losses.item() == pytest.approx({"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0}[name])
    assert output.chosen_rewards.item() == output.rejected_rewards.item() == 0.0


def test_trl_values(shared: Path) -> None:
    """Every case of TRL's that uses only what dsdpo's losses have."""
    golden = json.loads((shared / "parity" / "trl_golden_losses.json").read_text())
    tokens = torch.tensor(golden["completion_mask"]).sum(1)

    def summed(key: str) -> PairLogps:
        sums = torch.tensor(golden[key], dtype=torch.float64).sum(1)
        half = len(sums) // 2
        return PairLogps(sums[:half], sums[half:], tokens[:half], tokens[half:])

    policy, reference = summed("per_token_logps"), summed("ref_per_token_logps")
    cases = [case for case in golden["cases"] if str(case["loss"]) in LOSSES and set(case) <= {"loss", "beta", "value"}]
    assert {case["loss"] for case in cases} == set(LOSSES)
    for case in cases:
        loss = make_loss(case["loss"], beta=case.get("beta", 0.1), label_smoothing=0.0)(policy, reference)
        assert loss.losses.mean().item() == pytest.approx(case["value"], rel=1e-9), case


def test_config_knows_every_loss_and_option() -> None:
    """A loss or an option in one place only would be unreachable or without effect."""
    assert set(inspect.get_annotations(LossConfig, eval_str=True)["type"].__args__) == set(LOSSES)
    taken = {key for function in LOSSES.values() for key in inspect.signature(function).parameters}
    assert taken - {"policy", "reference"} == set(LossConfig.model_fields) - {"type"}
