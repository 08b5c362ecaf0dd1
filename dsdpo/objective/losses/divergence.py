"""The score of a response, from its log-ratio, that belongs to a divergence between policy and reference.

f-DPO (Wang et al. 2023, arXiv 2309.16240, table 1): the implicit reward is beta · f'(π/π_ref).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dsdpo.objective.logps import PairLogps

LARGEST_EXPONENT = 80.0  # exp of more is infinite in float32


def scores(
    policy: PairLogps, reference: PairLogps, f_divergence_type: str, f_alpha_divergence_coef: float
) -> tuple[Tensor, Tensor]:
    """f'(π/π_ref) of chosen and rejected, (B,) each; the log-ratio itself for the reverse KL."""
    ratios = (policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    chosen, rejected = (derivative(d, f_divergence_type, f_alpha_divergence_coef) for d in ratios)
    return chosen, rejected


def derivative(d: Tensor, f_divergence_type: str, f_alpha_divergence_coef: float) -> Tensor:
    """f'(u) at u = exp(d), up to a constant that cancels between two responses.

    reverse_kl: log u. forward_kl: 1 − 1/u. js_divergence: log(2u / (1 + u)). alpha_divergence: (u^(α−1) − 1)/(α − 1).
    """
    if f_divergence_type == "forward_kl":
        return 1.0 - torch.exp(torch.clamp(-d, max=LARGEST_EXPONENT))
    if f_divergence_type == "js_divergence":
        return math.log(2.0) + logsigmoid(d)
    power = f_alpha_divergence_coef - 1.0
    if f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return torch.expm1(torch.clamp(power * d, max=LARGEST_EXPONENT)) / power
    return d


def difference(
    policy: PairLogps, reference: PairLogps, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5
) -> Tensor:
    """Score of chosen less score of rejected, (B,): h for the reverse KL."""
    chosen, rejected = scores(policy, reference, f_divergence_type, f_alpha_divergence_coef)
    return chosen - rejected


def mean_difference(
    policy: PairLogps, reference: PairLogps, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5
) -> Tensor:
    """The same with each response's score divided by its number of tokens, (B,)."""
    chosen, rejected = scores(policy, reference, f_divergence_type, f_alpha_divergence_coef)
    return chosen / policy.chosen_tokens.clamp(min=1) - rejected / policy.rejected_tokens.clamp(min=1)
