"""What a run's throughput is held against: the operations that its two models need."""

from __future__ import annotations

from functools import partial
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.engine.build import device
from dsdpo.engine.lora import POLICY
from dsdpo.engine.shards import full_shape
from dsdpo.objective.flops import model_flops, step_flops
from dsdpo.reference.base import Reference
from dsdpo.training.perf import Perf


def measured(run: RunConfig, policy: Any, reference: Reference) -> Perf:
    """Figures of a run from now on."""
    scorer = reference.scorer()
    operations = partial(
        step_flops,
        policy=model_flops(policy.module.lm, adapter=POLICY, shape_of=full_shape),
        reference=model_flops(scorer[0], adapter=scorer[1], shape_of=full_shape) if scorer else None,
    )
    return Perf(device(), step_flops=operations, peak=run.tracking.peak_tflops)
