"""Metrics as sums and counts that stay on the device until they are read, with one all-reduce."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dsdpo.distributed import world_size
from dsdpo.objective.logps import NoLogps, PairLogps
from dsdpo.objective.losses import LossOutput


class Meter:
    """Means over pairs of all ranks and micro-batches since the last reading."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name -> (2,) float64: sum, count

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """Take one value per pair, (B,) each, counted with `weight` (B,): 0 for filler pairs."""
        count = weight.sum(dtype=torch.float64)
        for name, value in values.items():
            total = torch.where(weight > 0, value.detach() * weight, 0.0).sum(dtype=torch.float64)
            pair = torch.stack([total, count])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def state(self) -> dict[str, Tensor]:
        """What this rank has counted since the last reading."""
        return dict(self._sums)

    def restore(self, sums: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._sums = dict(sums)

    def read(self, own: Mapping[str, float] | None = None, *, device: torch.device | str = "cpu") -> dict[str, float]:
        """The means, and start again from nothing. Collective; the only wait for the device.

        With them come the means over ranks of this rank's `own` values, which have the same names on all ranks and
        travel over `device`.
        """
        own = own or {}
        names = [*self._sums, *own]
        if not names:
            return {}
        values = torch.tensor([[value, 1.0] for value in own.values()], dtype=torch.float64, device=device)
        table = torch.stack([*self._sums.values(), *values])
        if world_size() > 1:
            dist.all_reduce(table)
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True)}


def pair_metrics(output: LossOutput, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
    """The metrics of B pairs under TRL's names, (B,) each; rewards are beta · logratio.

    `reference/drift` is the mean logratio of both responses in nats: how far the policy has moved off its anchor, and
    under TR-DPO what a sync takes away. There is none without a reference.
    """
    metrics = {
        "loss": output.losses,
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/accuracies": (output.chosen_rewards > output.rejected_rewards).float(),
        "rewards/margins": output.chosen_rewards - output.rejected_rewards,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    if not isinstance(reference, NoLogps):
        drift = (policy.chosen - reference.chosen) + (policy.rejected - reference.rejected)
        metrics["reference/drift"] = drift / 2
    return metrics
