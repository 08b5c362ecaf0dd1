"""Losses that judge each response by itself, and those with a likelihood of the chosen one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dsdpo.objective.logps import PairLogps
from dsdpo.objective.losses.divergence import difference
from dsdpo.objective.losses.step import StepPairs


def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor) -> Tensor:
    """NCA for a pair (Chen et al. 2024, arXiv 2402.05369, eq. 13): −S(βd_c) − ½·S(−βd_c) − ½·S(−βd_l)."""
    chosen, rejected = _ratios(policy, reference)
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def bco_pair(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    bco_running_delta: bool,
    bco_delta: float | Tensor,
) -> Tensor:
    """BCO for a pair (Jung et al. 2024, arXiv 2404.04656, eq. 11): −S(βd_c − δ) − S(−(βd_l − δ)).

    δ is the mean reward of both responses over all earlier steps, where `bco_running_delta` asks for it, else 0 (TRL).
    """
    chosen, rejected = _ratios(policy, reference)
    delta = bco_delta if bco_running_delta else 0.0
    return -logsigmoid(beta * chosen - delta) - logsigmoid(-(beta * rejected - delta))


def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor) -> Tensor:
    """SPPO with certain labels (Wu et al. 2024, arXiv 2405.00675, eq. 4.7): (d_c − 1/(2β))² + (d_l + 1/(2β))²."""
    chosen, rejected = _ratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): 1 − σ(βd_c) + σ(βd_l).

    For chosen responses better than what the model writes: their likelihood goes up, the rejected ones' down.
    """
    chosen, rejected = _ratios(policy, reference)
    return 1.0 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): σ(βd_c) + 1 − σ(βh).

    For chosen responses worse than what the model writes: both likelihoods go down, the rejected ones' more.
    """
    chosen, rejected = _ratios(policy, reference)
    return torch.sigmoid(beta * chosen) + 1.0 - torch.sigmoid(beta * (chosen - rejected))


def cal_dpo(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor) -> Tensor:
    """Cal-DPO (Xiao et al. 2024, arXiv 2412.14516, eq. 9): −S(h) + (d_c − 1/(2β))² + (d_l + 1/(2β))².

    The squares tie the log-ratios to a scale, so that the chosen response's does not fall with the rejected one's.
    """
    return -logsigmoid(difference(policy, reference)) + sppo_hard(policy, reference, beta=beta)


def cpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    label_smoothing: float,
    cpo_alpha: float,
) -> Tensor:
    """CPO (Xu et al. 2024, arXiv 2401.08417, eq. 5), without reference: −S(β(p_c − p_l)) − α·p_c/n_c."""
    h = beta * (policy.chosen - policy.rejected)
    preference = -(1.0 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    return preference - cpo_alpha * policy.chosen / policy.chosen_tokens.clamp(min=1)


def orpo(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7), without reference: −p_c/n_c − β·S(log odds ratio).

    The odds are P/(1 − P) with P = exp(p/n), the likelihood of a mean token; beta is the paper's λ.
    """
    chosen = policy.chosen / policy.chosen_tokens.clamp(min=1)
    rejected = policy.rejected / policy.rejected_tokens.clamp(min=1)
    log_odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    return -chosen - beta * logsigmoid(log_odds)


def sft(policy: PairLogps, reference: PairLogps, *, step: StepPairs) -> Tensor:
    """Negative log-likelihood of the chosen responses, as a mean over all their tokens in the whole step.

    −p_c · pairs/tokens of the step, so that the mean over its pairs is that mean, however they are batched.
    """
    return -policy.chosen * step.pairs / step.chosen_tokens


def _log_complement(logp: Tensor) -> Tensor:
    """log(1 − exp(logp)), also where exp(logp) rounds to 1."""
    return torch.log(-torch.expm1(torch.clamp(logp, max=-1e-7)))


def _ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """d of chosen and rejected, (B,) each."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected
