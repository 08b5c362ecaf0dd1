"""Metrics as sums and counts that stay on the device until they are read, with one all-reduce."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dsdpo.distributed import world_size
from dsdpo.objective.logps import NoLogps, PairLogps
from dsdpo.objective.losses import LossOutput
from dsdpo.objective.router import describe_loads
from dsdpo.objective.scores import PolicyScores
from dsdpo.training.groups import GROUPED

BY_GROUP = ("loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected")  # of rated completions
LOADS = ("router/chosen/", "router/probability/")  # sums by expert
SEPARATOR = "\n"  # between the names of sums that are kept together


class Meter:
    """Weighted means over pairs of all ranks and micro-batches since the last reading."""

    def __init__(self, *, top_k: int = 1) -> None:
        """`top_k`: experts that a token goes to, in a mixture of experts."""
        self._top_k = top_k
        self._sums: dict[str, Tensor] = {}  # names -> (2,) or, of several, (n, 2) float64: sum, weight

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """Take one value per pair, (B,) each, counted with `weight` (B,), 0 for fillers: their values may be NaN."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        weight = weight.double()
        sums = torch.where(weight > 0, stacked * weight, 0.0).sum(1)
        self._keep(list(values), torch.stack([sums, weight.sum().expand_as(sums)], dim=1))

    def add_by_group(self, values: dict[str, Tensor], weight: Tensor, *, group: Tensor, names: list[str]) -> None:
        """The same apart for each group, as `names[k]/value`; `group` (B,) int64 says in which one a pair is."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        stacked = torch.where(weight > 0, stacked, 0.0)
        member = (group[None] == torch.arange(len(names), device=group.device)[:, None]) * weight.double()  # (K, B)
        sums = member @ stacked.T  # (K, n)
        counts = member.sum(1, keepdim=True).expand_as(sums)
        keys = [f"{name}/{key}" for name in names for key in values]
        self._keep(keys, torch.stack([sums.flatten(), counts.flatten()], dim=1))

    def add_loads(self, loads: Tensor) -> None:
        """Take a batch's routing, (2, experts), see `router.loads`; read as `router/...`."""
        sums = loads.detach().double().flatten()
        names = [f"{prefix}{expert}" for prefix in LOADS for expert in range(loads.shape[1])]
        self._keep(names, torch.stack([sums, torch.zeros_like(sums)], dim=1))

    def _keep(self, names: list[str], sums: Tensor) -> None:
        key = SEPARATOR.join(names)
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def state(self) -> dict[str, Tensor]:
        """What this rank has counted since the last reading."""
        return dict(self._sums)

    def restore(self, sums: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._sums = dict(sums)

    def read(self, own: Mapping[str, float] | None = None, *, device: torch.device | str = "cpu") -> dict[str, float]:
        """The means, and start again from nothing. Collective; the only wait for the device.

        With them come the means over ranks of this rank's `own` values, which have the same names on all ranks and
        travel over `device`. What no pair has counted for is left out.
        """
        own = own or {}
        names = [name for key in self._sums for name in key.split(SEPARATOR)] + list(own)
        if not names:
            return {}
        values = torch.tensor([[value, 1.0] for value in own.values()], dtype=torch.float64, device=device)
        table = torch.cat([*(sums.view(-1, 2) for sums in self._sums.values()), values.view(-1, 2)])
        if world_size() > 1:
            dist.all_reduce(table)
        self._sums = {}
        sums = dict(zip(names, table.tolist(), strict=True))
        means = {name: total / count for name, (total, count) in sums.items() if count}
        return means | margins_of_means(means) | self._routing(sums)

    def _routing(self, sums: Mapping[str, list[float]]) -> dict[str, float]:
        """What the routers' loads among the sums say."""
        chosen, probability = ([sums[name][0] for name in sums if name.startswith(prefix)] for prefix in LOADS)
        return describe_loads(chosen, probability, self._top_k) if sum(chosen) else {}


def pair_metrics(output: LossOutput, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
    """The metrics of B pairs under TRL's names, (B,) each; rewards are beta · logratio.

    An accuracy is strict: pairs whose two rewards are equal are counted in `rewards/ties`. `reference/drift` is the
    mean logratio of both responses in nats: how far the policy has moved off its anchor, and under TR-DPO what a sync
    takes away. There is none without a reference.
    """
    metrics = {
        "loss": output.losses,
        **{f"loss/{name}": values for name, values in output.parts.items()},
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/accuracies": (output.chosen_rewards > output.rejected_rewards).float(),
        "rewards/ties": (output.chosen_rewards == output.rejected_rewards).float(),
        "rewards/margins": output.chosen_rewards - output.rejected_rewards,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        "lengths/chosen": policy.chosen_tokens,
        "lengths/rejected": policy.rejected_tokens,
    }
    if not isinstance(reference, NoLogps):
        drift = (policy.chosen - reference.chosen) + (policy.rejected - reference.rejected)
        metrics["reference/drift"] = drift / 2
    return metrics


Counted = list[tuple[dict[str, Tensor], Tensor]]
"""Metrics, one value for each of B rows, and the weight (B,) that the rows have in them."""


def rated_metrics(output: LossOutput, policy: PairLogps, reference: PairLogps, weight: Tensor) -> Counted:
    """The metrics of B rated completions: chosen is the mean over desirable ones, rejected over undesirable ones.

    A completion counts as right where its log-ratio is on its rating's side of the KL estimate.
    """
    assert output.desirable is not None
    assert output.kl is not None
    ratio = policy.chosen - reference.chosen
    gap = (ratio - output.kl).detach() * torch.where(output.desirable, 1.0, -1.0)
    every = {
        "loss": output.losses,
        **{f"loss/{name}": values for name, values in output.parts.items()},
        "rewards/accuracies": (gap > 0).float(),
        "rewards/ties": (gap == 0).float(),
        "reference/drift": ratio,
        "kl": output.kl.expand_as(ratio),
    }
    counted: Counted = [(every, weight)]
    for side, those in (("chosen", output.desirable), ("rejected", ~output.desirable)):
        values = {"rewards": output.chosen_rewards, "logps": policy.chosen, "lengths": policy.chosen_tokens}
        counted.append(({f"{name}/{side}": value for name, value in values.items()}, weight * those))
    return counted


def margins_of_means(means: Mapping[str, float]) -> dict[str, float]:
    """The reward margins that no pair has: mean of desirable completions less mean of undesirable ones."""
    found = {}
    for name in means:
        before, chosen, after = name.rpartition("rewards/chosen")
        margin, rejected = f"{before}rewards/margins", f"{before}rewards/rejected"
        if chosen and not after and rejected in means and margin not in means:
            found[margin] = means[name] - means[rejected]
    return found


def count_pairs(
    meter: Meter, output: LossOutput, scored: PolicyScores, reference: PairLogps, weight: Tensor
) -> Counted:
    """Add B pairs, or rated completions, to what is counted; what is to be counted by group.

    Beside `pair_metrics`: the negative log-prob of a chosen token, the accuracy where the chosen response is the longer
    one and where it is the shorter, and the entropy at a response token where it is known.
    """
    policy = scored.logps
    chosen, rejected = policy.chosen_tokens, policy.rejected_tokens
    if output.desirable is not None:
        return _count_rated(meter, output, scored, reference, weight)
    metrics = pair_metrics(output, policy, reference)
    meter.add(metrics, weight)
    meter.add({"nll/chosen": -scored.chosen / chosen.clamp(min=1)}, weight * chosen)
    for name, those in (("longer", chosen > rejected), ("shorter", chosen < rejected)):
        meter.add({f"rewards/accuracies_chosen_{name}": metrics["rewards/accuracies"]}, weight * those)
    if scored.entropy is not None:
        for entropy, tokens in zip(scored.entropy, (chosen, rejected), strict=True):
            meter.add({"entropy": entropy}, weight * tokens)
    return [({name: metrics[name] for name in GROUPED}, weight)]


def _count_rated(
    meter: Meter, output: LossOutput, scored: PolicyScores, reference: PairLogps, weight: Tensor
) -> Counted:
    assert output.desirable is not None
    counted, tokens = rated_metrics(output, scored.logps, reference, weight), scored.logps.chosen_tokens
    for values, those in counted:
        meter.add(values, those)
    meter.add({"nll/chosen": -scored.chosen / tokens.clamp(min=1)}, weight * output.desirable * tokens)
    if scored.entropy is not None:
        meter.add({"entropy": scored.entropy[0]}, weight * tokens)
    kept = [({name: values[name] for name in values if name in BY_GROUP}, those) for values, those in counted]
    return kept
