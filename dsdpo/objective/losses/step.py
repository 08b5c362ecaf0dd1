"""Losses that depend on all pairs of an optimizer step, whatever ranks and micro-batches they are on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dsdpo.objective.logps import PairLogps


@dataclass(frozen=True)
class StepPairs:
    """The G pairs of an optimizer step on all ranks, without gradient, as a batch of B of them sees them."""

    pairs: int
    chosen_tokens: Tensor  # () response tokens of all chosen responses
    own: Tensor  # (B,) int64, where the batch's pairs stand among all; anything in range for a filler pair
    policy: PairLogps | None = None  # of all pairs, (G,), for the losses that ask for them
    reference: PairLogps | None = None

    @classmethod
    def of(cls, policy: PairLogps, reference: PairLogps) -> StepPairs:
        """A step that is one batch."""
        fixed = replace(policy, chosen=policy.chosen.detach(), rejected=policy.rejected.detach())
        own = torch.arange(len(policy.chosen), device=policy.chosen.device)
        return cls(len(own), policy.chosen_tokens.sum(), own, fixed, reference)

    def everything(self) -> tuple[PairLogps, PairLogps]:
        """Log-probs of all pairs under policy and reference, (G,) each."""
        assert self.policy is not None
        assert self.reference is not None
        return self.policy, self.reference


def aot(
    policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, label_smoothing: float, step: StepPairs
) -> Tensor:
    """AOT, paired (Melnyk et al. 2024, arXiv 2406.05882, eq. 7): the k-th smallest p_c − p_l against that r_c − r_l.

    −(1−ε)·S(βx) − ε·S(−βx) with x the difference at each place in the two orders.
    """
    every, anchor = step.everything()
    places = _places(every.chosen - every.rejected)[step.own]
    wanted = torch.sort(anchor.chosen - anchor.rejected).values[places]
    return _smoothed(beta * (policy.chosen - policy.rejected - wanted), label_smoothing)


def aot_unpaired(
    policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, label_smoothing: float, step: StepPairs
) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882, eq. 9): the k-th smallest d_c against the k-th smallest d_l, as in `aot`.

    A pair's value is that of its chosen response's place. Its rejected response meets another pair's chosen one, which
    is a number here: what that place's loss says of it is added as a term of value 0, so that the sum over all pairs
    has the gradient of the sum over all places.
    """
    every, anchor = step.everything()
    chosen, rejected = every.chosen - anchor.chosen, every.rejected - anchor.rejected
    met = torch.sort(rejected).values[_places(chosen)[step.own]]
    loss = _smoothed(beta * (policy.chosen - reference.chosen - met), label_smoothing)
    met = torch.sort(chosen).values[_places(rejected)[step.own]]
    other = _smoothed(beta * (met - (policy.rejected - reference.rejected)), label_smoothing)
    return loss + (other - other.detach())


def alpha_dpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float | Tensor,
    simpo_gamma: float,
    alpha_dpo_alpha: float,
    step: StepPairs,
) -> Tensor:
    """AlphaDPO (Wu et al. 2024, arXiv 2410.10148, eq. 12): SimPO whose margin follows the log-ratio.

    −S(β(p_c/n_c − p_l/n_l) − γ − α·M), where M is the pair's difference of mean log-ratios, standardized over the step
    and taken as a number.
    """
    gaps = _mean_gap(*step.everything())
    spread = gaps.std() if len(gaps) > 1 else gaps.new_zeros(())
    standardized = (gaps - gaps.mean()) / spread.clamp(min=1e-6)
    chosen = policy.chosen / policy.chosen_tokens.clamp(min=1)
    rejected = policy.rejected / policy.rejected_tokens.clamp(min=1)
    return -logsigmoid(beta * (chosen - rejected) - simpo_gamma - alpha_dpo_alpha * standardized[step.own])


def _mean_gap(policy: PairLogps, reference: PairLogps) -> Tensor:
    chosen = (policy.chosen - reference.chosen) / policy.chosen_tokens.clamp(min=1)
    return chosen - (policy.rejected - reference.rejected) / policy.rejected_tokens.clamp(min=1)


def _places(values: Tensor) -> Tensor:
    """(G,) int64: the place of each value in ascending order; equal values in the order of the step's pairs."""
    places = torch.empty_like(values, dtype=torch.int64)
    places[torch.argsort(values, stable=True)] = torch.arange(len(values), device=values.device)
    return places


def _smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    return -(1.0 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)
