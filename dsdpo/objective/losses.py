"""Preference losses: plain functions of policy and reference log-probs, one value per pair.

Notation: h = (policy chosen − reference chosen) − (policy rejected − reference rejected), the difference of logratios
in nats. A new loss is one function, one line in `LOSSES`, and its options among the fields of `loss:` in the config.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dsdpo.objective.logps import PairLogps


@dataclass(frozen=True)
class LossOutput:
    """The loss of B pairs and the implicit rewards beta · logratio (Rafailov et al. 2023, arXiv 2305.18290, eq. 5)."""

    losses: Tensor  # (B,) float32, with gradient
    chosen_rewards: Tensor  # (B,) float32, detached
    rejected_rewards: Tensor  # (B,) float32, detached


LossFn = Callable[[PairLogps, PairLogps], LossOutput]


def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): −log σ(βh); with label smoothing ε its conservative form, cDPO.

    cDPO (Mitchell 2023) takes each label to be flipped with probability ε: −(1−ε)·log σ(βh) − ε·log σ(−βh).
    """
    h = beta * _difference(policy, reference)
    return -(1.0 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """SLiC's hinge on the same margin (Zhao et al. 2023, arXiv 2305.10425; as in RSO, 2309.06657): max(0, 1 − βh)."""
    return relu(1.0 - beta * _difference(policy, reference))


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): (h − 1/(2β))², with logratios averaged over response tokens."""
    chosen = (policy.chosen - reference.chosen) / policy.chosen_tokens.clamp(min=1)
    rejected = (policy.rejected - reference.rejected) / policy.rejected_tokens.clamp(min=1)
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
}


def make_loss(name: str, *, beta: float, **options: float) -> LossFn:
    """The loss `name` with its options bound; options that it does not take are left out."""
    function = LOSSES[name]
    taken = inspect.signature(function).parameters
    bound = partial(function, beta=beta, **{key: value for key, value in options.items() if key in taken})

    def loss(policy: PairLogps, reference: PairLogps) -> LossOutput:
        return LossOutput(
            losses=bound(policy, reference),
            chosen_rewards=beta * (policy.chosen - reference.chosen).detach(),
            rejected_rewards=beta * (policy.rejected - reference.rejected).detach(),
        )

    return loss


def _difference(policy: PairLogps, reference: PairLogps) -> Tensor:
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
