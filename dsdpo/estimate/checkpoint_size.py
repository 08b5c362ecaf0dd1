"""Bytes of a checkpoint: on the disk, and of the copies out of which it is written in the background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsdpo.config.reference_plan import ReferencePlan
from dsdpo.engine.zero_config import stage
from dsdpo.estimate.memory import FLOAT32, optimizer_states


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint, by who writes them."""

    spread: float  # in equal parts by all ranks
    first: float  # besides by rank 0
    each: float  # besides by every rank

    def total(self, ranks: int) -> float:
        """Of the whole checkpoint."""
        return self.spread + self.first + self.each * ranks

    def of_rank(self, rank: int, ranks: int) -> float:
        """That one rank writes, and copies where it does so in the background."""
        return self.spread / ranks + self.each + (0.0 if rank else self.first)

    def of_node(self, per_node: int, ranks: int) -> float:
        """That the ranks of rank 0's node write."""
        return sum(self.of_rank(rank, ranks) for rank in range(min(per_node, ranks)))


def checkpoint_size(
    policy_config: dict[str, Any],
    reference_config: dict[str, Any],
    reference: ReferencePlan,
    *,
    trained: int,
    whole: int,
    itemsize: int,
) -> CheckpointSize:
    """Trained weights, masters and optimizer states, and a moving reference.

    `trained` elements of the policy are, `whole` is all that a reference in an engine of its own has; of `itemsize`
    bytes. Under ZeRO-3 weights are in the masters alone.
    """
    level = stage(policy_config)
    masters = float((1 + optimizer_states(policy_config)) * FLOAT32 * trained)
    weights = 0.0 if level == 3 else float(itemsize * trained)
    spread, first, each = (masters, weights, 0.0) if level else (0.0, masters + weights, 0.0)
    if reference.sync is not None and reference.has_weights:
        shared = reference.shares_policy
        moving = float((FLOAT32 if reference.sync.alpha < 1.0 else itemsize) * (trained if shared else whole))
        if stage(policy_config if shared else reference_config) == 3:
            spread += moving
        else:
            each += moving
    return CheckpointSize(spread, first, each)
