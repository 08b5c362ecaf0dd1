"""Losses of single completions that are rated desirable or undesirable.

A rated completion stands in the batch's place of the chosen response, whatever its rating; in that of the rejected one
stands a completion of another prompt, for the losses that estimate the KL with it, or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsdpo.objective.logps import PairLogps
from dsdpo.objective.losses.step import StepPairs


def kto(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    desirable_weight: float,
    undesirable_weight: float,
    desirable: Tensor,
    step: StepPairs,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8): w·(1 − σ(β(d − z))), undesirable w·(1 − σ(β(z − d))).

    z is `mismatched_kl`, without gradient.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(policy.chosen.dtype)
    loss = torch.sigmoid(-sign * beta * (policy.chosen - reference.chosen - mismatched_kl(step)))
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)


def apo_zero_unpaired(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    desirable_weight: float,
    undesirable_weight: float,
    desirable: Tensor,
) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7) of single ones.

    w·(1 − σ(βd)) for a desirable completion, w·σ(βd) for an undesirable one.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(policy.chosen.dtype)
    loss = torch.sigmoid(-sign * beta * (policy.chosen - reference.chosen))
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)


def mismatched_kl(step: StepPairs) -> Tensor:
    """KL of policy from reference, () nats: the mean log-ratio of the step's mismatched completions, at least 0."""
    policy, reference = step.everything()
    return (policy.rejected - reference.rejected).mean().clamp(min=0)
