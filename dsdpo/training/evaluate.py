"""Held-out metrics over every pair exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dsdpo.data.batch import PreferenceBatch
from dsdpo.engine.types import TrainingEngine
from dsdpo.objective.logps import pair_logps
from dsdpo.objective.losses import LossFn
from dsdpo.reference.base import Reference
from dsdpo.training.metrics import Meter, pair_metrics


@torch.no_grad()
def evaluate(
    policy: TrainingEngine,
    reference: Reference,
    loss_fn: LossFn,
    windows: Iterable[Sequence[PreferenceBatch]],
) -> dict[str, float]:
    """Means over the held-out pairs of all ranks, under the names `eval/...`. Collective.

    Ranks hold equally many batches; filler pairs keep them in step and are not counted.
    """
    meter = Meter()
    policy.eval()
    for window in windows:
        for batch, reference_logps in zip(window, reference.score(window), strict=True):
            policy_logps = pair_logps(policy, batch)
            output = loss_fn(policy_logps, reference_logps)
            meter.add(pair_metrics(output, policy_logps, reference_logps), weight=(batch.pair_ids >= 0).float())
    policy.train()
    return {f"eval/{name}": value for name, value in meter.read().items()}
