"""What a policy's forward pass gives a loss beside summed log-probs, where the loss asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsdpo.config.loss import LossConfig
from dsdpo.data.batch import PreferenceBatch
from dsdpo.objective.logps import PairLogps, last_responses, logps_of, token_counts
from dsdpo.objective.router import Routing


@dataclass(frozen=True)
class PolicyScores:
    """One forward pass over B pairs."""

    logps: PairLogps  # with the loss's token weights, with gradient
    chosen: Tensor  # (B,) log-prob of chosen with every token counted once; with gradient
    likelihood: Tensor | None = None  # (B,) WPO: see `wpo_likelihood`
    entropy: Tensor | None = None  # (2B,) mean over a response's tokens, nats
    loads: Tensor | None = None  # (2, experts), see `router.loads`; with gradient


def extras_of(loss: LossConfig, *, entropy: bool = False) -> tuple[str, ...]:
    """What the scorer has to give beside its sums, by the names of `ResponseScorer.forward`."""
    plain = loss.token_weights is not None and (loss.rpo_alpha is not None or "sft" in loss.types)
    wanted = {"plain": plain, "alignment": loss.use_weighting, "entropy": entropy}
    return tuple(name for name, needed in wanted.items() if needed)


def policy_scores(
    model: Callable[..., Any],
    batch: PreferenceBatch,
    extras: tuple[str, ...] = (),
    routing: Routing | None = None,
) -> PolicyScores:
    """One forward pass of the policy on pairs. Collective under ZeRO-3."""
    asked = {"extras": extras, "routing": routing}
    answer = model(batch=batch, **{name: value for name, value in asked.items() if value})
    answer, loads = answer if routing else (answer, None)
    rows = answer.view(1 + len(extras), batch.group_size, batch.num_pairs)
    tokens = token_counts(batch).view(batch.group_size, -1)
    logps = logps_of(rows[0], tokens)
    found = dict(zip(extras, rows[1:], strict=True))
    if batch.group_size > 2 and "entropy" in found:  # of the ends, as all else that is recorded
        last = last_responses(tokens)[None]
        entropy = torch.cat([found["entropy"][:1], found["entropy"].gather(0, last)])
        found["entropy"], tokens = entropy, torch.cat([tokens[:1], tokens.gather(0, last)])
    return PolicyScores(
        logps,
        found["plain"][0] if "plain" in found else logps.chosen,
        wpo_likelihood(found["alignment"], tokens) if "alignment" in found else None,
        (found["entropy"] / tokens.clamp(min=1)).detach() if "entropy" in found else None,
        loads,
    )


def wpo_likelihood(alignment: Tensor, tokens: Tensor) -> Tensor:
    """WPO's weight of B pairs (Zhou et al. 2024, arXiv 2406.11827, eq. 2), without gradient.

    For each response exp of the mean over its tokens of log p(token) − log Σ_v p(v)², `alignment` (2, B) being the sum
    over tokens; the weights of both responses are multiplied.
    """
    return torch.exp((alignment / tokens.clamp(min=1)).sum(0)).detach()
