"""A step's time for ranks on many nodes: what one node was measured to take, and what collectives take on its links.

The collectives of a step are those of `dsdpo/estimate/traffic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsdpo.data.binning import LayoutName, MicroBatchBudget
from dsdpo.data.plan import plan_step, rank_costs, step_cost
from dsdpo.estimate.seconds import Machine, StepTime
from dsdpo.estimate.traffic import REFERENCE_WEIGHTS, Exchange


@dataclass(frozen=True)
class Profile:
    """Seconds of a step's arithmetic on a rank, without collectives."""

    policy: float
    reference: float
    rest: float  # the update, offload, and whatever else a step waits for


@dataclass(frozen=True)
class Scaled:
    """Seconds of a step."""

    arithmetic: float  # the costliest ranks'
    collectives: float
    total: float
    efficiency: float  # of ranks that neither wait for each other nor for a link: 1


def profile_of(time: StepTime) -> Profile:
    """What a forecast says."""
    return Profile(time.policy, time.reference, time.offload + time.optimizer)


def scaled(
    profile: Profile,
    exchanges: Sequence[Exchange],
    seconds: Callable[[Exchange], float],
    *,
    imbalance: float = 1.0,
    overlap: bool,
) -> Scaled:
    """A step of the same work a rank, with collectives that take `seconds` each.

    `imbalance`: the costliest rank's arithmetic in each micro-batch over the mean rank's. With `overlap` the
    collectives of a model go on beside its arithmetic, else after it.
    """
    moved = {
        theirs: sum(seconds(one) for one in exchanges if (one.name == REFERENCE_WEIGHTS) == theirs)
        for theirs in (False, True)
    }
    computed = {False: profile.policy * imbalance, True: profile.reference * imbalance}
    together = max if overlap else lambda first, second: first + second
    total = profile.rest + sum(together(computed[model], moved[model]) for model in (False, True))
    ideal = profile.policy + profile.reference + profile.rest
    return Scaled(sum(computed.values()), sum(moved.values()), total, ideal / total)


def by_bandwidth(bytes_per_s: float, ranks: int) -> Callable[[Exchange], float]:
    """Seconds of collectives whose ring goes over links that carry so many bytes a second each way."""
    return lambda exchange: exchange.sent(ranks) / bytes_per_s


def link_bytes(exchanges: Sequence[Exchange], machine: Machine) -> tuple[float, float]:
    """Bytes that a step sends each way over the links of a rank within its node, and of its node to others.

    A ring passes a node's devices and leaves it once; what several rings carry together is the same.
    """
    sizes = [(one.sent(machine.ranks), one.group or machine.ranks) for one in exchanges]
    within = sum(sent for sent, _ in sizes) if machine.per_node > 1 else 0.0
    return within, sum(sent for sent, ranks in sizes if ranks > machine.per_node)


def imbalance_of(
    lengths: np.ndarray, *, ranks: int, pairs_per_step: int, budget: MicroBatchBudget, layout: LayoutName = "packed"
) -> float:
    """Tokens that the steps of these pairs take with ranks in step, over those of the mean rank.

    `lengths`: (n, 3) tokens of prompt, chosen and rejected. Whole steps only.
    """
    waited = mean = 0.0
    for start in range(0, len(lengths) - pairs_per_step + 1, pairs_per_step):
        plan = plan_step(
            lengths,
            consumed_pairs=start,
            pairs_per_step=pairs_per_step,
            world_size=ranks,
            budget=budget,
            seed=0,
            shuffle=False,
            layout=layout,
        )
        waited += step_cost(plan.micro_batches, lengths, layout=layout)
        mean += sum(rank_costs(plan.micro_batches, lengths, layout=layout)) / ranks
    return waited / mean


def at_share_of_peak(machine: Machine, share: float, usual: float) -> Machine:
    """The machine if its devices reached this share of their peak in place of the `usual` one."""
    return replace(machine, gpu=replace(machine.gpu, tflops=machine.gpu.tflops * share / usual))
