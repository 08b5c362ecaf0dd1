"""What ranks send each other in a step under a DeepSpeed config, by collective.

Of a tensor that n ranks gather or reduce-scatter, each link of a ring carries (n - 1)/n each way, of one that they
all-reduce twice as much. Source: DeepSpeed 0.19.8's `stage3.py`, `stage_1_and_2.py` and `partition_parameters.py`;
`benchmarks/scale_model.py` holds it against bytes counted on links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dsdpo.engine.deepspeed_keys import lookup
from dsdpo.engine.zero_config import stage
from dsdpo.estimate.memory import REDUCE_BUCKET, EngineMemory
from dsdpo.estimate.weights import Weights

REFERENCE_WEIGHTS = "weights of the reference"


@dataclass(frozen=True)
class Exchange:
    """The collectives of one kind in a step."""

    name: str
    size: float  # bytes of the whole tensors, of all these collectives together
    count: float  # collectives
    laps: int = 1  # around the ring: 2 where every rank gets every sum
    group: int | None = None  # ranks that share it, neighbours of each other; None: all

    def sent(self, ranks: int) -> float:
        """Bytes that each link of the ring carries each way."""
        ranks = self.group or ranks
        return self.size * self.laps * (ranks - 1) / ranks


def training_exchanges(
    config: dict[str, Any], weights: Weights, memory: EngineMemory, micro_batches: float, *, gloo: bool = False
) -> tuple[Exchange, ...]:
    """Of the engine that trains: gathers of weights, reduction of gradients, updated weights.

    Under `gloo` a reduce-scatter is an all-reduce of which each rank keeps its part.
    """
    b, trained = weights.itemsize, weights.total(trained=True)
    bucket = max(1, int(config["zero_optimization"].get("reduce_bucket_size", REDUCE_BUCKET)))
    quantized = lookup(config, "zero_optimization.zero_quantized_gradients")  # int4 within 16 bits
    name, size, buckets = "gradients", b * trained / (4 if quantized else 1), math.ceil(trained / bucket)
    if stage(config) == 3 and memory.gathers is not None:
        received = gather_bytes(config, b * memory.gathers.received * micro_batches)
        # hpZ: an update spoils the node's copy of what it changes, so that its next gather is over all ranks.
        over_all = min(received, gather_bytes(config, b * trained)) if gather_group(config) else 0.0
        calls, share = memory.gathers.calls * micro_batches, over_all / received if received else 0.0
        gathers = (
            Exchange("weights after an update", over_all, calls * share),
            Exchange("weights", received - over_all, calls * (1 - share), group=gather_group(config)),
            Exchange(name, size * micro_batches, buckets * micro_batches, laps=2 if gloo else 1),
        )
        return tuple(one for one in gathers if one.size)
    reductions = micro_batches if stage(config) == 2 else 1.0
    found = Exchange(name, size * reductions, buckets * reductions, laps=2)
    return (found, Exchange("updated weights", float(b * trained), 1.0)) if stage(config) else (found,)


def scoring_exchanges(
    config: dict[str, Any], weights: Weights, memory: EngineMemory, passes: float
) -> tuple[Exchange, ...]:
    """Of the engine that scores pairs for the reference, in so many passes. With hpZ its copies on a node stay good."""
    if memory.scoring_gathers is None or not memory.scoring_gathers.received:
        return ()
    size = gather_bytes(config, weights.itemsize * memory.scoring_gathers.received * passes)
    calls = memory.scoring_gathers.calls * passes
    return (Exchange(REFERENCE_WEIGHTS, size, calls, group=gather_group(config)),)


def gather_bytes(config: dict[str, Any], received: float) -> float:
    """What goes over the wire for weights of so many bytes."""
    return received / 2 if lookup(config, "zero_optimization.zero_quantized_weights") else received


def gather_group(config: dict[str, Any]) -> int | None:
    """Ranks that have a copy of the weights among them (hpZ), None without it."""
    group = int(lookup(config, "zero_optimization.zero_hpz_partition_size") or 1)
    return group if group > 1 else None
