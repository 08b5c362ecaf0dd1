"""One optimizer step: forward and backward of each micro-batch against the reference's log-probs, then one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dsdpo.data.steps import StepBatches
from dsdpo.distributed import world_size
from dsdpo.engine.types import TrainingEngine
from dsdpo.objective.logps import PairLogps
from dsdpo.objective.losses import LossOutput
from dsdpo.objective.scores import policy_scores
from dsdpo.phases import Phase, untimed
from dsdpo.training.groups import DeviceGroups
from dsdpo.training.metrics import Meter, count_pairs
from dsdpo.training.nonfinite import marked, without_fillers
from dsdpo.training.step_loss import StepLoss, given


def train_step(
    policy: TrainingEngine,
    anchor: Sequence[PairLogps],
    loss: StepLoss,
    window: StepBatches,
    meter: Meter,
    *,
    step: int = 1,
    groups: DeviceGroups | None = None,
    phase: Phase = untimed,
) -> list[LossOutput]:
    """One optimizer update on the mean loss of the window's pairs, however they are batched. Collective.

    `anchor` has the reference's log-probs of each batch; `step` counts from 1; of the pairs of `groups` metrics are
    counted apart.

    Returns what came out for this rank's micro-batches, detached. The update is left out on all ranks where a loss or
    gradient is not finite.
    """
    outputs = []
    # DeepSpeed averages gradients over ranks; each rank contributes the sum over its own share of the pairs.
    scale = world_size() / window.pairs
    with phase("forward_backward"):
        only = None
        if loss.needs_pass and len(window.batches) == 1:  # then this pass gives what one ahead would
            only = policy_scores(policy, window.batches[0], loss.extras, loss.routing)
        inputs = loss.ahead(policy, window, anchor, only, step=step)
        for batch, reference_logps, own in zip(window.batches, anchor, inputs, strict=True):
            scored = only or policy_scores(policy, batch, loss.extras, loss.routing)
            weight = (batch.pair_ids >= 0).to(scored.logps.chosen.dtype)
            reference_logps = without_fillers(reference_logps, scored.logps, weight)
            output = loss.function(scored.logps, reference_logps, given(own, scored))
            total = (output.losses * weight).sum() * scale + loss.balance(scored) * world_size()
            policy.backward(marked(total, output, weight), scale_wrt_gas=False)
            if scored.loads is not None:
                meter.add_loads(scored.loads)
            apart = count_pairs(meter, output, scored, reference_logps, weight * window.counts)
            for names, group in groups.of(batch.pair_ids) if groups else ():
                for values, counted in apart:
                    meter.add_by_group(values, counted, group=group, names=names)
            outputs.append(replace(output, losses=output.losses.detach()))
    with phase("optimizer"):
        policy.step()
    return outputs
