"""From the loss section of a run to one function: the parts, their weights, and what all of them share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsdpo.config.loss import LOSSES, LossConfig, takes
from dsdpo.objective.logps import PairLogps
from dsdpo.objective.losses import lists, margins, rated, responses, step
from dsdpo.objective.losses.rated import mismatched_kl
from dsdpo.objective.losses.registered import REGISTERED
from dsdpo.objective.losses.step import StepPairs

WHERE: tuple[ModuleType, ...] = (margins, responses, step, rated, lists)
"""Modules whose functions are the losses of the same name."""
PER_TOKEN_REWARDS = {"simpo", "orpo"}  # rank responses by their mean log-prob


@dataclass(frozen=True)
class LossInputs:
    """What a loss may be given beside the log-probs of its B pairs."""

    beta: float | Tensor | None = None  # of this step; None: the first of the settings
    step: StepPairs | None = None  # None: the batch is the whole step
    weight: Tensor | None = None  # (B,) from the data: times the whole loss of a pair
    margin: Tensor | None = None  # (B,) from the data
    confidence: Tensor | None = None  # (B,) from the data: how likely the label is right
    likelihood: Tensor | None = None  # (B,) WPO: how likely the policy is to write the pair itself
    chosen: Tensor | None = None  # (B,) plain log-prob of chosen, where tokens of `policy` do not count alike
    bco_delta: float | Tensor = 0.0  # mean reward of earlier steps
    desirable: Tensor | None = None  # (B,) bool, of rated completions
    scores: Tensor | None = None  # (B, n) of lists, the higher, the better; NaN where there is no such response


@dataclass(frozen=True)
class LossOutput:
    """The loss of B pairs and the implicit rewards beta · log-ratio (arXiv 2305.18290, eq. 5)."""

    losses: Tensor  # (B,) with gradient
    chosen_rewards: Tensor  # (B,) detached
    rejected_rewards: Tensor  # (B,) detached
    parts: dict[str, Tensor] = field(default_factory=dict)  # (B,) detached: of several losses, each without its weight
    desirable: Tensor | None = None  # (B,) bool, of rated completions, which stand under chosen whatever their rating
    kl: Tensor | None = None  # () nats, what the log-ratios of rated completions are held against


NOTHING = LossInputs()
LossFn = Callable[..., LossOutput]
"""(policy: PairLogps, reference: PairLogps, inputs: LossInputs = ...) -> LossOutput"""


def make_loss(loss: LossConfig) -> LossFn:
    """The function that a run minimizes, averaged over pairs: the weighted sum of its parts."""
    functions = {name: bound(name, loss) for name in loss.types}
    own = {name: partial(function, **options) for name, (function, options, _) in functions.items()}
    asks_for_step = any("step" in names for _, _, names in functions.values())
    first_beta = loss.beta_at(1, 1)

    def combined(policy: PairLogps, reference: PairLogps, inputs: LossInputs = NOTHING) -> LossOutput:
        beta = first_beta if inputs.beta is None else inputs.beta
        step = inputs.step or (StepPairs.of(policy, reference) if asks_for_step else None)
        given = {"beta": beta, "step": step, "margin": inputs.margin, "bco_delta": inputs.bco_delta}
        given |= {"desirable": inputs.desirable, "scores": inputs.scores}
        plain = policy
        if inputs.chosen is not None:
            plain = PairLogps(inputs.chosen, policy.rejected, policy.chosen_tokens, policy.rejected_tokens)
        parts: dict[str, Tensor] = {}
        for name, function in own.items():
            more = _chosen(given, functions[name][2])
            if loss.label_confidence and takes(name, "label_confidence"):
                assert inputs.confidence is not None
                more["label_smoothing"] = 1.0 - inputs.confidence
            values = function(plain if name == "sft" else policy, reference, **more)
            if loss.use_weighting and takes(name, "use_weighting"):
                assert inputs.likelihood is not None
                values = values * inputs.likelihood
            parts[name] = values
        total = torch.stack([weight * parts[name] for name, weight in loss.parts]).sum(0)
        if loss.rpo_alpha is not None:
            parts["nll"] = -plain.chosen / plain.chosen_tokens.clamp(min=1)
            total = total + loss.rpo_alpha * parts["nll"]
        if inputs.weight is not None:
            total = total * inputs.weight
        chosen, rejected = rewards(loss, policy, reference, beta)
        shown = {name: part.detach() for name, part in parts.items()} if len(parts) > 1 else {}
        if loss.rows != "rated":
            return LossOutput(total, chosen, rejected, shown)
        kl = mismatched_kl(step) if loss.mismatched and step else chosen.new_zeros(())
        return LossOutput(total, chosen, rejected, shown, desirable=inputs.desirable, kl=kl)

    return combined


def rewards(loss: LossConfig, policy: PairLogps, reference: PairLogps, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Implicit rewards of chosen and rejected, (B,) each, detached: beta · log-ratio.

    Without a reference beta · log-prob, of a mean token where the loss compares those (as TRL has it).
    """
    if loss.reference_use == "unused":
        chosen, rejected = policy.chosen, policy.rejected
        if PER_TOKEN_REWARDS & set(loss.types):
            chosen = chosen / policy.chosen_tokens.clamp(min=1)
            rejected = rejected / policy.rejected_tokens.clamp(min=1)
    else:
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return beta * chosen.detach(), beta * rejected.detach()


def bound(name: str, loss: LossConfig) -> tuple[Callable[..., Tensor], dict[str, Any], tuple[str, ...]]:
    """A loss's function, its options by the settings, and what it must be given at each call."""
    function = REGISTERED.get(name) or next((getattr(module, name) for module in WHERE if hasattr(module, name)), None)
    assert function is not None, f"{name} stands in LOSSES, but no function in objective/losses/ has that name"
    names = [key for key in inspect.signature(function).parameters if key not in ("policy", "reference")]
    options = {key: getattr(loss, key) for key in names if key in LOSSES[name].options}
    own = LOSSES[name].own
    options |= {key: loss.options.get(key, default) for key, default in own.items()}
    return function, options, tuple(key for key in names if key not in options)


def _chosen(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: given[name] for name in names}
