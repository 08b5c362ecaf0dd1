"""Losses of lists of ranked or scored completions of one prompt.

d is a completion's log-ratio, s its score or, from ranks, what orders it; a completion loses to one of a higher score,
and those of equal scores are not held against each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dsdpo.objective.logps import ListLogps, PairLogps


def plackett_luce(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, scores: Tensor) -> Tensor:
    """DPO of a whole ranking (Rafailov et al. 2023, arXiv 2305.18290, eq. 20): −Σ_i log(e^βd_i / Σ_{s_j ≤ s_i} e^βd_j).

    Summed over all completions that beat another one.
    """
    rewards, beats = _rewards(policy, reference, beta), _beats(policy, scores)
    return (_log_share_lost(rewards, beats) * beats.any(2)).sum(1)


def best_vs_rest(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, scores: Tensor) -> Tensor:
    """Softmax-DPO (Chen et al. 2024, arXiv 2406.09215, eq. 11): −log(e^βd_1 / Σ_j e^βd_j), of the best completion.

    Where several have the best score, their mean, each against the completions that it beats.
    """
    rewards, beats = _rewards(policy, reference, beta), _beats(policy, scores)
    best = beats.any(2) & ~beats.any(1)
    return (_log_share_lost(rewards, beats) * best).sum(1) / best.sum(1).clamp(min=1)


def all_pairs(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, scores: Tensor) -> Tensor:
    """Pairwise logistic loss of a list (LiPO: Liu et al. 2024, arXiv 2402.01878, eq. 6): mean of −S(β(d_i − d_j)).

    Over all pairs of the list whose first completion beats the second.
    """
    rewards, beats = _rewards(policy, reference, beta), _beats(policy, scores)
    losses = -logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    return (losses * beats).sum((1, 2)) / beats.sum((1, 2)).clamp(min=1)


def _rewards(policy: PairLogps, reference: PairLogps, beta: float | Tensor) -> Tensor:
    """βd, (B, n); of completions that are not there 0."""
    assert isinstance(policy, ListLogps)
    assert isinstance(reference, ListLogps)
    return beta * (policy.responses - reference.responses)


def _beats(policy: PairLogps, scores: Tensor) -> Tensor:
    """(B, n, n) bool: whether completion i is better than j; false where one is not there."""
    assert isinstance(policy, ListLogps)
    there = (policy.response_tokens > 0) & ~scores.isnan()
    return (scores[:, :, None] > scores[:, None, :]) & there[:, :, None] & there[:, None, :]


def _log_share_lost(rewards: Tensor, beats: Tensor) -> Tensor:
    """(B, n): −log of a completion's share of the sum of e^βd over itself and all that it beats."""
    own = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    against = torch.where(beats | own, rewards[:, None, :], -math.inf)
    return against.logsumexp(2) - rewards
