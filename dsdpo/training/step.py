"""One optimizer step: forward and backward of each micro-batch against the reference's log-probs, then one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dsdpo.data.steps import StepBatches
from dsdpo.distributed import world_size
from dsdpo.engine.types import TrainingEngine
from dsdpo.objective.logps import PairLogps, pair_logps
from dsdpo.objective.losses import LossFn, LossOutput
from dsdpo.training.metrics import Meter, pair_metrics
from dsdpo.training.nonfinite import marked
from dsdpo.training.perf import Phase, untimed


def train_step(
    policy: TrainingEngine,
    anchor: Sequence[PairLogps],
    loss_fn: LossFn,
    window: StepBatches,
    meter: Meter,
    *,
    phase: Phase = untimed,
) -> list[LossOutput]:
    """One optimizer update on the mean loss of the window's pairs, however they are batched. Collective.

    `anchor` has the reference's log-probs of each batch.

    Returns what came out for this rank's micro-batches, detached. The update is left out on all ranks where a loss or
    gradient is not finite.
    """
    outputs = []
    # DeepSpeed averages gradients over ranks; each rank contributes the sum over its own share of the pairs.
    scale = world_size() / window.pairs
    with phase("forward_backward"):
        for batch, reference_logps in zip(window.batches, anchor, strict=True):
            policy_logps = pair_logps(policy, batch)
            output = loss_fn(policy_logps, reference_logps)
            weight = (batch.pair_ids >= 0).to(output.losses.dtype)
            policy.backward(marked((output.losses * weight).sum() * scale, output, weight), scale_wrt_gas=False)
            meter.add(pair_metrics(output, policy_logps, reference_logps), weight)
            outputs.append(replace(output, losses=output.losses.detach()))
    with phase("optimizer"):
        policy.step()
    return outputs
