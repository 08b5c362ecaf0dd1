"""Losses against TRL's values and code, against numbers derived by hand, and against finite differences."""

from __future__ import annotations

import inspect
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsdpo.config.loss import COMMON, DIVERGENCE, LOSSES, LossConfig
from dsdpo.objective.logps import ListLogps, PairLogps, logps_of
from dsdpo.objective.losses import LossInputs, StepPairs, make_loss
from dsdpo.objective.losses.combined import bound

# Needed wherever exo_pair is: it takes the logarithm of the label smoothing.
SMOOTHING = {"exo_pair": {"label_smoothing": 0.001}}


def config(name: str | list[str], **options: Any) -> LossConfig:
    return LossConfig(type=name, **{**SMOOTHING.get(str(name), {}), **options})


def logps(chosen: float, rejected: float, tokens: tuple[int, int] = (2, 4)) -> PairLogps:
    return PairLogps(
        torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([tokens[0]]), torch.tensor([tokens[1]])
    )


def S(x: float) -> float:  # noqa: N802 (as in the formulas)
    return -math.log(1 + math.exp(-x))


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# d_c = -1 + 3 = 2, d_l = -6 + 4 = -2, h = 4; beta 0.5 -> 1, -1, 2. Per token: 2 / 2 - (-2 / 4) = 1.5.
# Mean log-probs of the policy: -0.5 and -1.5.
POLICY, REFERENCE = logps(-1.0, -6.0), logps(-3.0, -4.0)
ODDS = (-0.5 + 1.5) - (math.log(1 - math.exp(-0.5)) - math.log(1 - math.exp(-1.5)))
BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    ("sigmoid", {}, -S(2)),
    ("sigmoid", {"label_smoothing": 0.25}, -0.75 * S(2) - 0.25 * S(-2)),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, -S(0.5 * (math.exp(2) - math.exp(-2)))),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, -S(0.5 * (S(2) - S(-2)))),
    ("sigmoid", {"f_divergence_type": "alpha_divergence"}, -S(0.5 * (math.exp(-1) - math.exp(1)) / -0.5)),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, -S(2)),
    ("sigmoid", {"rpo_alpha": 2.0}, -S(2) + 2 * 0.5),
    ("robust", {"label_smoothing": 0.25}, (-0.75 * S(2) + 0.25 * S(-2)) / 0.5),
    ("hinge", {}, 0.0),
    ("hinge", {"beta": 0.1}, 0.6),
    ("ipo", {}, (1.5 - 1.0) ** 2),
    (
        "exo_pair",
        {"label_smoothing": 0.25},
        sig(2) * (S(2) - math.log(0.75)) + sig(-2) * (S(-2) - math.log(0.25)),
    ),
    ("discopop", {"discopop_tau": 2.0}, -S(2) * (1 - sig(1)) + math.exp(-2) * sig(1)),
    ("sigmoid_norm", {}, -S(0.75)),
    ("nca_pair", {}, -S(1) - 0.5 * S(-1) - 0.5 * S(1)),
    ("bco_pair", {}, -S(1) - S(1)),
    ("sppo_hard", {}, (2 - 1) ** 2 + (-2 + 1) ** 2),
    ("apo_zero", {}, 1 - sig(1) + sig(-1)),
    ("apo_down", {}, sig(1) + 1 - sig(2)),
    ("dpop", {}, -S(2)),  # the chosen response has not fallen
    ("dpo_shift", {"dpo_shift_lambda": 0.5}, -S(0.5 * (2 + 1))),
    ("cal_dpo", {}, -S(4) + 1 + 1),
    ("simpo", {"simpo_gamma": 0.25}, -S(0.5 * 1.0 - 0.25)),
    ("cpo", {"cpo_alpha": 2.0}, -S(0.5 * 5) + 2 * 0.5),
    ("orpo", {}, 0.5 - 0.5 * S(ODDS)),
    ("sft", {}, 0.5),
    ("aot", {}, -S(2)),  # with one pair the orders have one place
    ("aot_unpaired", {}, -S(2)),
    ("alpha_dpo", {"simpo_gamma": 0.25}, -S(0.5 * 1.0 - 0.25)),  # one pair has no spread
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_values_by_hand(name: str, options: dict[str, Any], expected: float) -> None:
    beta = {} if name == "sft" else {"beta": 0.5}
    output = make_loss(config(name, **{**beta, **options}))(POLICY, REFERENCE)
    assert output.losses.item() == pytest.approx(expected, abs=1e-6)
    if LOSSES[name].reference != "unused" and "beta" not in options:
        assert output.chosen_rewards.item() == pytest.approx(0.5 * 2)
        assert output.rejected_rewards.item() == pytest.approx(0.5 * -2)


def test_values_by_hand_with_columns_of_the_data() -> None:
    margin = LossInputs(margin=torch.tensor([3.0]), weight=torch.tensor([4.0]))
    odpo = make_loss(config("odpo", beta=0.5, margin_scale=0.5))(POLICY, REFERENCE, margin)
    assert odpo.losses.item() == pytest.approx(4 * -S(2 - 1.5), abs=1e-6)
    rpo = make_loss(config("reward_rpo", beta=0.5, margin_scale=0.5))(POLICY, REFERENCE, margin)
    wanted = sig(1.5) * (S(1.5) - S(2)) + sig(-1.5) * (S(-1.5) - S(-2))
    assert rpo.losses.item() == pytest.approx(4 * wanted, abs=1e-6)
    # Where the policy's margin is the data's, nothing is left to learn.
    equal = LossInputs(margin=torch.tensor([4.0]))
    assert make_loss(config("reward_rpo", beta=0.5, margin_scale=0.5))(
        POLICY, REFERENCE, equal
    ).losses.item() == pytest.approx(0.0, abs=1e-7)


def test_rated_completions_by_hand() -> None:
    # Two completions with d = 2 and -1; the mismatched ones have d = 3 and -1, whose mean is 1. beta 0.5.
    policy = PairLogps(*torch.tensor([[-1.0, -6.0], [-2.0, -4.0]]), *torch.tensor([[2, 4], [3, 5]]))
    reference = PairLogps(*torch.tensor([[-3.0, -5.0], [-5.0, -3.0]]), *torch.tensor([[2, 4], [3, 5]]))
    weights = {"desirable_weight": 3.0, "undesirable_weight": 0.5}
    given = LossInputs(desirable=torch.tensor([True, False]))
    output = make_loss(config("kto", beta=0.5, **weights))(policy, reference, given)
    assert output.losses.tolist() == pytest.approx([3 * (1 - sig(0.5 * (2 - 1))), 0.5 * (1 - sig(0.5 * (1 + 1)))])
    assert output.kl is not None
    assert output.kl.item() == 1.0
    assert output.chosen_rewards.tolist() == [1.0, -0.5]
    output = make_loss(config("apo_zero_unpaired", beta=0.5, **weights))(policy, reference, given)
    assert output.losses.tolist() == pytest.approx([3 * (1 - sig(1)), 0.5 * sig(-0.5)])
    # A mean below 0 counts as 0; the weight of a row of the data is a factor.
    flipped = LossInputs(desirable=torch.tensor([False, True]), weight=torch.tensor([1.0, 10.0]))
    output = make_loss(config("kto", beta=0.5))(reference, policy, flipped)
    assert output.losses.tolist() == pytest.approx([1 - sig(1), 10 * (1 - sig(0.5))])


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if kind.rows == "rated"])
def test_rated_completions_have_the_loss_and_gradient_of_trls_code(name: str) -> None:
    trainer = pytest.importorskip("trl").KTOTrainer
    policy, reference = random_logps(0), random_logps(1)
    given = LossInputs(desirable=DESIRABLE)
    for drop in (0.0, 9.0):  # with a KL estimate above 0, and one that is cut off there
        # TRL takes log-probs of tokens from a model: one token a completion, whose log-prob is the completion's.
        mismatched = replace(policy, rejected=policy.rejected + 1.0 - drop)
        ours, theirs = (policy.chosen.detach().clone().requires_grad_() for _ in range(2))
        options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
        value = make_loss(config(name, **options))(replace(mismatched, chosen=ours), reference, given).losses.mean()
        value.backward()
        expected = trl_kto(trainer, name, theirs, mismatched, reference, options)
        expected.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def trl_kto(
    trainer: Any, name: str, chosen: Tensor, policy: PairLogps, reference: PairLogps, options: dict[str, float]
) -> Tensor:
    """`KTOTrainer._compute_loss` on a batch of completions of one token."""
    count = len(chosen)
    ids = torch.ones(count, 2, dtype=torch.int64)
    mask = torch.tensor([[0, 1]]).repeat(count, 1)

    def model(**inputs: Any) -> Any:
        assert inputs["labels"].tolist() == [[-100, 1]] * count
        zeros = torch.zeros(count, 1)
        logps = chosen if torch.is_grad_enabled() and inputs.get("matched") else policy.rejected
        return SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros)

    model.training = True  # type: ignore[attr-defined]
    itself = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=name == "kto",
        loss_type=name,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )
    itself._compute_kl_logps = lambda *_: policy.rejected if name == "kto" else None
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, "label": DESIRABLE,
        "ref_logps": reference.chosen, "ref_KL_logps": reference.rejected,
    }  # fmt: skip
    loss: Tensor = trainer._compute_loss(itself, lambda **given: model(**given, matched=True), inputs, False)
    return loss


LISTS = [name for name, kind in LOSSES.items() if kind.rows == "lists"]


def list_logps(rows: list[list[float]], tokens: list[list[int]]) -> ListLogps:
    found = logps_of(torch.tensor(rows, dtype=torch.float64).T, torch.tensor(tokens).T)
    assert isinstance(found, ListLogps)
    return found


def test_lists_by_hand() -> None:
    """d = 2, 1, -1 (beta 0.5: 1, 0.5, -0.5); the second list has two completions, d = 3, -1 (1.5, -0.5)."""
    tokens = [[2, 2, 2], [2, 2, 0]]
    policy = list_logps([[-1, -3, -6], [-2, -5, 0]], tokens)
    reference = list_logps([[-3, -4, -5], [-5, -4, 0]], tokens)
    assert policy.rejected.tolist() == [-6.0, -5.0]
    given = LossInputs(scores=torch.tensor([[9.0, 5.0, 1.0], [3.0, 1.0, math.nan]]))
    e = math.exp
    first = -math.log(e(1) / (e(1) + e(0.5) + e(-0.5)))
    by_hand = {
        "plackett_luce": first - S(1),
        "best_vs_rest": first,
        "all_pairs": -(S(0.5) + S(1.5) + S(1)) / 3,
    }
    assert set(by_hand) == set(LISTS)
    for name, expected in by_hand.items():
        output = make_loss(config(name, beta=0.5))(policy, reference, given)
        assert output.losses.tolist() == pytest.approx([expected, -S(2)], abs=1e-6), "a list of two is a pair"
        assert output.chosen_rewards.tolist() == [1.0, 1.5]
        assert output.rejected_rewards.tolist() == [-0.5, -0.5]
    # The first two of equal score: both beat the third, neither the other.
    equal = LossInputs(scores=torch.tensor([[5.0, 5.0, 1.0], [3.0, 1.0, math.nan]]))
    tied = {"plackett_luce": -S(1.5) - S(1), "best_vs_rest": -(S(1.5) + S(1)) / 2, "all_pairs": -(S(1.5) + S(1)) / 2}
    for name, expected in tied.items():
        assert make_loss(config(name, beta=0.5))(policy, reference, equal).losses[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("name", LISTS)
def test_gradients_of_lists_are_those_of_finite_differences(name: str) -> None:
    tokens = [[2, 3, 1, 4], [2, 2, 5, 0]]
    reference = list_logps([[-3, -4, -5, -2], [-5, -4, -1, 0]], tokens)
    scores = torch.tensor([[4.0, 3.0, 3.0, 1.0], [3.0, 2.0, 1.0, math.nan]])

    def value(responses: Tensor) -> Tensor:
        policy = logps_of(responses.T, torch.tensor(tokens).T)
        return make_loss(config(name, beta=0.5))(policy, reference, LossInputs(scores=scores)).losses.sum()

    start = torch.tensor([[-1.0, -3, -6, -2], [-2, -5, -3, 0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (start,))
    value(start).backward()
    assert start.grad is not None
    assert start.grad[1, 3] == 0.0, "there is no such completion"


def test_dpop_punishes_a_chosen_response_that_has_fallen() -> None:
    # The other way round d_c = -2, h = -4: the penalty is 10 * 2.
    loss = make_loss(config("dpop", beta=0.5, dpop_lambda=10.0))(REFERENCE, POLICY)
    assert loss.losses.item() == pytest.approx(-S(0.5 * (-4 - 20)))


def test_bco_takes_the_mean_reward_of_earlier_steps_from_both() -> None:
    inputs = LossInputs(bco_delta=0.25)
    loss = make_loss(config("bco_pair", beta=0.5, bco_running_delta=True))(POLICY, REFERENCE, inputs)
    assert loss.losses.item() == pytest.approx(-S(1 - 0.25) - S(1 + 0.25))
    assert make_loss(config("bco_pair", beta=0.5))(POLICY, REFERENCE, inputs).losses.item() == pytest.approx(-2 * S(1))


def test_rewards_without_a_reference_are_those_that_the_loss_ranks_by() -> None:
    simpo = make_loss(config("simpo", beta=2.0))(POLICY, REFERENCE)
    assert (simpo.chosen_rewards.item(), simpo.rejected_rewards.item()) == (-1.0, -3.0)
    cpo = make_loss(config("cpo", beta=2.0))(POLICY, REFERENCE)
    assert (cpo.chosen_rewards.item(), cpo.rejected_rewards.item()) == (-2.0, -12.0)


def test_a_schedule_moves_beta_from_start_to_end() -> None:
    line = LossConfig.model_validate({"beta": {"start": 0.1, "end": 0.5, "steps": 5}})
    assert [round(line.beta_at(step, 100), 6) for step in (1, 2, 3, 5, 6, 100)] == [0.1, 0.2, 0.3, 0.5, 0.5, 0.5]
    cosine = LossConfig.model_validate({"beta": {"start": 1.0, "end": 3.0, "schedule": "cosine"}})
    # Half the way at half the time; at a quarter of the time (1 - cos(pi / 4)) / 2 of it.
    assert cosine.beta_at(3, 5) == pytest.approx(2.0)
    assert cosine.beta_at(2, 5) == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)) / 2)
    assert cosine.beta_at(1, 1) == 1.0
    loss = make_loss(line)
    assert loss(POLICY, REFERENCE).losses.item() == pytest.approx(-S(0.4))
    assert loss(POLICY, REFERENCE, LossInputs(beta=0.5)).losses.item() == pytest.approx(-S(2))


# TRL's values.


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shared / "parity" / "trl_golden_losses.json").read_text())
    return found


NAMES = {"ls": "label_smoothing", "fdiv": "f_divergence_type", "fa": "f_alpha_divergence_coef", "ld": "ld_alpha"}


def summed(values: Tensor, mask: Tensor, ld_alpha: float | None) -> PairLogps:
    """Per-token values (2B, T) as summed log-probs, tokens beyond the shorter response weighted by ld_alpha."""
    tokens = mask.sum(1)
    half = len(tokens) // 2
    place = mask.cumsum(1)
    shared_length = torch.minimum(tokens[:half], tokens[half:]).repeat(2)[:, None]
    tail = torch.tensor(1.0 if ld_alpha is None else ld_alpha, dtype=values.dtype)
    weight = torch.where(place <= shared_length, 1.0, tail) * mask
    sums = (values * weight[:, 1:]).sum(1)
    return PairLogps(sums[:half], sums[half:], tokens[:half], tokens[half:])


def mean_loss(golden: dict[str, Any], case: dict[str, Any], values: Tensor) -> Tensor:
    """The loss of a golden case, through `make_loss`, without the options that TRL ignores there."""
    options = {ours: case[name] for name, ours in NAMES.items() if name in case}
    names = [case["loss"]] if isinstance(case["loss"], str) else case["loss"]
    options = {
        key: value
        for key, value in options.items()
        if any(key in LOSSES[name].options or key in LOSSES[name].common for name in names)
        and not (key == "label_smoothing" and names == ["sigmoid"])
    }
    if "weights" in case:
        options["weights"] = case["weights"]
    if names != ["sft"]:
        options["beta"] = case.get("beta", 0.1)
    mask = torch.tensor(golden["completion_mask"])
    reference = torch.tensor(golden["ref_per_token_logps"], dtype=torch.float64)
    ld_alpha = options.get("ld_alpha")
    policy = summed(values, mask, ld_alpha)
    half = len(mask) // 2
    inputs = LossInputs(chosen=summed(values, mask, None).chosen)
    if case.get("wpo"):
        options["use_weighting"] = True
        gaps = (values.detach() - torch.tensor(golden["log_sum_sq_probs"], dtype=torch.float64)) * mask[:, 1:]
        likely = torch.exp(gaps.sum(1) / mask.sum(1))
        inputs = LossInputs(chosen=inputs.chosen, likelihood=likely[:half] * likely[half:])
    return make_loss(LossConfig(type=case["loss"], **options))(
        policy, summed(reference, mask, ld_alpha), inputs
    ).losses.mean()


def test_every_golden_value_of_trl(golden: dict[str, Any]) -> None:
    values = torch.tensor(golden["per_token_logps"], dtype=torch.float64)
    assert len(golden["cases"]) >= 60
    assert {case["loss"] for case in golden["cases"] if isinstance(case["loss"], str)} <= set(LOSSES)
    for case in golden["cases"]:
        assert mean_loss(golden, case, values).item() == pytest.approx(case["value"], abs=1e-6), case


def trl_loss(golden: dict[str, Any], case: dict[str, Any], values: Tensor) -> Tensor:
    """The same from the code of the TRL that is installed, given the log-probs in place of a model."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    names = [case["loss"]] if isinstance(case["loss"], str) else case["loss"]
    mask = torch.tensor(golden["completion_mask"])
    reference = summed(torch.tensor(golden["ref_per_token_logps"], dtype=values.dtype), mask, case.get("ld"))
    alike = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=alike,
        aux_loss_enabled=False,
        ld_alpha=case.get("ld"),
        precompute_ref_logps=True,
        f_divergence_type=case.get("fdiv", "reverse_kl"),
        f_alpha_divergence_coef=case.get("fa", 0.5),
        beta=case.get("beta", 0.1),
        loss_types=names,
        loss_weights=case.get("weights", [1.0] * len(names)),
        label_smoothing=case.get("ls", 0.0),
        use_weighting=case.get("wpo", False),
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros_like(values)
    sums = torch.tensor(golden["log_sum_sq_probs"], dtype=values.dtype)
    outputs = SimpleNamespace(
        log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=sums
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference.chosen,
        "ref_rejected_logps": reference.rejected,
    }
    loss: Tensor = trainer._compute_loss(stub, lambda **_: outputs, inputs, False)
    return loss


def test_values_and_gradients_of_the_installed_trl(golden: dict[str, Any]) -> None:
    for case in golden["cases"]:
        if case.get("wpo") and case["loss"] == "hinge":
            continue  # TRL 1.16 weighs its losses in place, after which torch cannot differentiate this one
        dtype = torch.float32 if "fa" in case else torch.float64  # TRL knows no float64 there
        found = []
        for loss in (mean_loss, trl_loss):
            values = torch.tensor(golden["per_token_logps"], dtype=dtype, requires_grad=True)
            value = loss(golden, case, values)
            value.backward()
            assert values.grad is not None
            found.append((value.item(), values.grad * torch.tensor(golden["completion_mask"])[:, 1:]))
        (ours, our_grad), (theirs, their_grad) = found
        tolerance = 1e-5 if dtype == torch.float32 else 1e-7 if case["loss"] == "exo_pair" else 1e-9
        assert ours == pytest.approx(theirs, rel=tolerance), case
        torch.testing.assert_close(our_grad, their_grad, rtol=tolerance, atol=tolerance, msg=str(case))


# Every loss.


DESIRABLE = torch.tensor([True, False, False, True, True])


def rated(name: str) -> bool:
    return LOSSES[name].rows == "rated"


def random_logps(seed: int, count: int = 5) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = -3 * torch.rand(2, count, generator=generator, dtype=torch.float64) - 0.5
    tokens = torch.randint(1, 9, (2, count), generator=torch.Generator().manual_seed(7))
    return PairLogps(chosen, rejected, tokens[0], tokens[1])


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if kind.rows != "lists"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_gradients_are_those_of_finite_differences(name: str, divergence: str) -> None:
    options: dict[str, Any] = {} if name == "sft" else {"beta": 0.5}
    if divergence != "reverse_kl":
        if not set(DIVERGENCE) <= set(LOSSES[name].options):
            pytest.skip("not defined for this loss")
        options["f_divergence_type"] = divergence
    loss = make_loss(config(name, **options))
    policy, reference = random_logps(0), random_logps(1)
    margin = torch.linspace(0, 2, 5, dtype=torch.float64)

    def value(chosen: Tensor, rejected: Tensor) -> Tensor:
        given = PairLogps(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens)
        # What these take of the step is a number.
        step = StepPairs.of(random_logps(0), reference) if name in ("alpha_dpo", "kto") else None
        inputs = LossInputs(margin=margin, step=step, desirable=DESIRABLE if rated(name) else None)
        return loss(given, reference, inputs).losses.sum()

    inputs = (policy.chosen.requires_grad_(), policy.rejected.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].step_logps or LOSSES[name].step_tokens])
def test_a_step_in_parts_has_the_loss_and_gradient_of_the_step_as_one_batch(name: str) -> None:
    policy, reference = random_logps(0, count=7), random_logps(1, count=7)
    loss = make_loss(config(name))
    whole = StepPairs.of(policy, reference)

    def gradient(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = policy.chosen.clone().requires_grad_(), policy.rejected.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for own in parts:
            mine = PairLogps(chosen[own], rejected[own], policy.chosen_tokens[own], policy.rejected_tokens[own])
            theirs = PairLogps(*(getattr(reference, key)[own] for key in ("chosen", "rejected")), *vars_of(mine))
            step = StepPairs(7, whole.chosen_tokens, own, whole.policy, whole.reference)
            labels = torch.arange(7)[own] % 3 == 0 if rated(name) else None
            total = total + loss(mine, theirs, LossInputs(step=step, desirable=labels)).losses.sum()
        total.backward()
        assert chosen.grad is not None
        grads = chosen.grad, rejected.grad if rejected.grad is not None else torch.zeros_like(rejected)
        return total.detach(), *grads

    once = gradient([torch.arange(7)])
    for parts in ([[3, 0], [6, 1, 2], [5, 4]], [[index] for index in range(7)]):
        for ours, expected in zip(gradient([torch.tensor(part) for part in parts]), once, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def vars_of(logps: PairLogps) -> tuple[Tensor, Tensor]:
    return logps.chosen_tokens, logps.rejected_tokens


def test_a_mix_is_the_weighted_sum_of_its_parts() -> None:
    policy, reference = random_logps(0), random_logps(1)
    mix = make_loss(LossConfig(type=["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.0]))(policy, reference)
    alone = {name: make_loss(config(name))(policy, reference).losses for name in ("sigmoid", "bco_pair", "sft")}
    assert set(mix.parts) == set(alone)
    for name, values in alone.items():
        torch.testing.assert_close(mix.parts[name], values)
    torch.testing.assert_close(mix.losses, 0.8 * alone["sigmoid"] + 0.2 * alone["bco_pair"] + alone["sft"])
    assert make_loss(LossConfig())(policy, reference).parts == {}


def test_each_loss_takes_what_its_line_says() -> None:
    """A name in one place only would be unreachable or without effect."""
    known = {"policy", "reference", "beta", "step", "margin", "bco_delta", "desirable", "scores"}
    above = {"beta_dpo_alpha", "label_confidence"}  # of no function: they decide what one is given
    for name, kind in LOSSES.items():
        function, options, _ = bound(name, config(name))
        taken = set(inspect.signature(function).parameters) - known
        assert taken == set(options), name
        assert set(kind.options) - above == taken, name
        assert ("beta" in inspect.signature(function).parameters) == kind.beta, name
        assert ("step" in inspect.signature(function).parameters) == (kind.step_logps or kind.step_tokens), name
        assert ("margin" in inspect.signature(function).parameters) == (kind.column == "margin"), name
        assert ("desirable" in inspect.signature(function).parameters) == rated(name), name
        assert ("scores" in inspect.signature(function).parameters) == (kind.rows == "lists"), name
        assert "arXiv" in (function.__doc__ or "") or name == "sft", name
    fields = set(LossConfig.model_fields) - {"type", "weights", "beta", "beta_schedule", "options"}
    assert fields == {option for kind in LOSSES.values() for option in kind.options} | set(COMMON)


def test_each_pair_is_smoothed_by_its_own_confidence() -> None:
    """With the same confidence for all it is label smoothing; with certain labels, none; with none, the other label."""
    policy, reference = PairLogps.cat([POLICY] * 3), PairLogps.cat([REFERENCE] * 3)
    sure = LossInputs(confidence=torch.tensor([0.75, 1.0, 0.9]))
    for name in ("sigmoid", "robust", "simpo", "cpo"):
        found = make_loss(config(name, label_confidence=True))(policy, reference, sure).losses
        for value, smoothing in zip(found.tolist(), (0.25, 0.0, 0.1), strict=True):
            smoothed = config(name, label_smoothing=smoothing)
            assert value == pytest.approx(float(make_loss(smoothed)(POLICY, REFERENCE).losses), rel=1e-6), name
    wrong = make_loss(config("sigmoid", label_confidence=True, beta=0.5))
    none = wrong(POLICY, REFERENCE, LossInputs(confidence=torch.tensor([0.0])))
    assert float(none.losses) == pytest.approx(-S(-2), rel=1e-6)
    mixed = make_loss(config(["sigmoid", "hinge"], label_confidence=True, beta=0.1))
    assert float(mixed(POLICY, REFERENCE, LossInputs(confidence=torch.tensor([0.75]))).losses) == pytest.approx(
        -0.75 * S(0.4) - 0.25 * S(-0.4) + 0.6, rel=1e-6
    )
