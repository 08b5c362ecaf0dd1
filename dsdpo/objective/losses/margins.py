"""Losses of the difference between a pair's two responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dsdpo.objective.logps import PairLogps
from dsdpo.objective.losses.divergence import difference, mean_difference


def sigmoid(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    label_smoothing: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): −S(βh); with label smoothing ε its conservative form, cDPO.

    cDPO (Mitchell 2023) takes each label to be flipped with probability ε: −(1−ε)·S(βh) − ε·S(−βh).
    """
    return _smoothed(beta * difference(policy, reference, f_divergence_type, f_alpha_divergence_coef), label_smoothing)


def robust(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    label_smoothing: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """rDPO (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12): unbiased where a share ε of the labels is flipped.

    (−(1−ε)·S(βh) + ε·S(−βh)) / (1 − 2ε).
    """
    h = beta * difference(policy, reference, f_divergence_type, f_alpha_divergence_coef)
    loss = -(1.0 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)
    return loss / (1.0 - 2.0 * label_smoothing)


def hinge(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """SLiC's hinge on the same margin (Zhao et al. 2023, arXiv 2305.10425; as in RSO, 2309.06657): max(0, 1 − βh)."""
    return relu(1.0 - beta * difference(policy, reference, f_divergence_type, f_alpha_divergence_coef))


def ipo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): (h − 1/(2β))², with log-ratios averaged over tokens."""
    h = mean_difference(policy, reference, f_divergence_type, f_alpha_divergence_coef)
    return (h - 1.0 / (2.0 * beta)) ** 2


def exo_pair(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    label_smoothing: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """EXO-pref (Ji et al. 2024, arXiv 2402.00856, eq. 16): KL from the policy's preference to the label's, (1−ε, ε).

    σ(βh)·(S(βh) − log(1−ε)) + σ(−βh)·(S(−βh) − log ε), so ε must be above 0.
    """
    h = beta * difference(policy, reference, f_divergence_type, f_alpha_divergence_coef)
    right = torch.sigmoid(h) * (logsigmoid(h) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-h) * (logsigmoid(-h) - math.log(label_smoothing))
    return right + wrong


def discopop(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    discopop_tau: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414, eq. 5).

    −S(βh)·(1 − m) + exp(−βh)·m, with m = σ(βh/τ).
    """
    h = beta * difference(policy, reference, f_divergence_type, f_alpha_divergence_coef)
    share = torch.sigmoid(h / discopop_tau)
    return -logsigmoid(h) * (1.0 - share) + torch.exp(-h) * share


def sigmoid_norm(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """Length-normalized DPO (Tülu 3: Lambert et al. 2024, arXiv 2411.15124, eq. 6): −S(β(d_c/n_c − d_l/n_l))."""
    return -logsigmoid(beta * mean_difference(policy, reference, f_divergence_type, f_alpha_divergence_coef))


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, dpop_lambda: float) -> Tensor:
    """DPO-Positive (Pal et al. 2024, arXiv 2402.13228, eq. 3): −S(β(h − λ·max(0, r_c − p_c))).

    The penalty keeps the chosen response at least as likely as it was under the reference.
    """
    fallen = relu(reference.chosen - policy.chosen)
    return -logsigmoid(beta * (difference(policy, reference) - dpop_lambda * fallen))


def dpo_shift(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, dpo_shift_lambda: float) -> Tensor:
    """DPO-Shift (Yang et al. 2025, arXiv 2502.07599, eq. 3.1) with fixed f(λ) = λ: −S(β(d_c − λ·d_l))."""
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return -logsigmoid(beta * (chosen - dpo_shift_lambda * rejected))


def odpo(
    policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, margin: Tensor, margin_scale: float
) -> Tensor:
    """DPO with an offset (Amini et al. 2024, arXiv 2402.10571, eq. 9): −S(βh − scale · the data's margin)."""
    return -logsigmoid(beta * difference(policy, reference) - margin_scale * margin)


def reward_rpo(
    policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, margin: Tensor, margin_scale: float
) -> Tensor:
    """Reward-aware preference optimization (Nemotron-4: arXiv 2406.11704, section 3.3.2), with its Bernoulli KL.

    KL of the preference that the data's margin says, σ(scale · margin), from the policy's, σ(βh): least where the
    policy's reward margin is the data's.
    """
    h, wanted = beta * difference(policy, reference), margin_scale * margin
    right = torch.sigmoid(wanted) * (logsigmoid(wanted) - logsigmoid(h))
    return right + torch.sigmoid(-wanted) * (logsigmoid(-wanted) - logsigmoid(-h))


def simpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    label_smoothing: float,
    simpo_gamma: float,
) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6), without reference: −S(β·p_c/n_c − β·p_l/n_l − γ)."""
    chosen = policy.chosen / policy.chosen_tokens.clamp(min=1)
    rejected = policy.rejected / policy.rejected_tokens.clamp(min=1)
    return _smoothed(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def _smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε)·S(h) − ε·S(−h)."""
    return -(1.0 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
