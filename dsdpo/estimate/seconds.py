"""How long a step takes at least: arithmetic, collectives and what goes to and from host and disk.

A model of bandwidths, made to put configurations in order; absolute times hold where kernels reach `EFFICIENCY`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsdpo.engine.deepspeed_keys import lookup
from dsdpo.engine.zero_config import offload_device, stage
from dsdpo.estimate.hardware import GB, Hardware
from dsdpo.estimate.memory import FLOAT32, EngineMemory, optimizer_states
from dsdpo.estimate.traffic import Exchange, scoring_exchanges, training_exchanges
from dsdpo.estimate.weights import Weights
from dsdpo.objective.flops import ModelFlops, Work

# Of the peak that matrix products of a transformer reach on a GPU, attention included: PyTorch trainers publish 33 to
# 42 % of an H100's.
EFFICIENCY = 0.4
HOST_MEMORY = 200 * GB  # bytes a second that a node's CPUs read and write, for its ranks together
NVME = 6 * GB  # bytes a second of a node's disks
# Seconds of an NCCL collective beside its bytes, by NCCL's own table for rings (protocol Simple): at the start, and for
# each hop over NVLink and over the network.
START, HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6


@dataclass(frozen=True)
class Machine:
    """What a run is to run on."""

    gpu: Hardware
    ranks: int
    per_node: int  # ranks of a node
    host_memory: float | None = None  # bytes of a node; None: not known

    @property
    def nodes(self) -> int:
        """Nodes that so many ranks fill."""
        return -(-self.ranks // self.per_node)

    def seconds(self, exchange: Exchange) -> float:
        """What these collectives take: a ring through all ranks of the group, node by node.

        All devices of a node put their share of the network together: as many rings go round as there are of them.
        """
        ranks = exchange.group or self.ranks
        spans = ranks > self.per_node
        speed = min(self.gpu.link, self.gpu.network * self.per_node) if self.per_node > 1 else self.gpu.network
        hops = -(-ranks // self.per_node) - 1 if spans else 0  # over the network
        waited = 0.0 if self.gpu.is_cpu or ranks == 1 else START + HOP * (ranks - 1 - hops) + NETWORK_HOP * hops
        return exchange.sent(self.ranks) / (speed if spans else self.gpu.link) + waited * exchange.laps * exchange.count


@dataclass(frozen=True)
class StepWork:
    """What one rank does in one optimizer step."""

    work: Work  # its share of the step's pairs
    micro_batches: float
    scoring_passes: float
    pairs: float  # of all ranks


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what takes them; what runs beside arithmetic counts only where it takes longer."""

    policy: float  # arithmetic
    reference: float
    collectives: float
    offload: float
    optimizer: float
    total: float
    exchanges: tuple[Exchange, ...]  # of which the collectives are


def step_time(
    machine: Machine,
    step: StepWork,
    *,
    policy: tuple[dict[str, Any], Weights, EngineMemory, ModelFlops],
    reference: tuple[dict[str, Any], Weights, EngineMemory, ModelFlops] | None,
    checkpointing: bool,
) -> StepTime:
    """Of a run. `reference`: the engine that scores pairs as training goes, the policy's own included; None: none."""
    config, weights, memory, flops = policy
    speed = machine.gpu.tflops * 1e12 * EFFICIENCY
    operations = flops.forward(step.work) + flops.backward(step.work) + 2 * flops.head * step.work.scored
    if checkpointing:
        operations += flops.forward(step.work) - 2 * flops.head * step.work.scored
    arithmetic = operations / speed
    sent = training_exchanges(config, weights, memory, step.micro_batches, gloo=machine.gpu.is_cpu)
    moved = sum(map(machine.seconds, sent))
    offload = offload_time(machine, config, weights, memory, step.micro_batches, trains=True)
    hidden = overlaps(config)
    total = max(arithmetic, moved + offload.passes) if hidden else arithmetic + moved + offload.passes
    total += offload.update
    scored, scoring, fetched = 0.0, 0.0, 0.0
    if reference is not None:
        config, weights, memory, flops = reference
        scored = flops.forward(step.work) / speed
        theirs = scoring_exchanges(config, weights, memory, step.scoring_passes)
        scoring = sum(map(machine.seconds, theirs))
        sent += theirs
        fetched = offload_time(machine, config, weights, memory, step.scoring_passes, trains=False).passes
        total += max(scored, scoring + fetched) if hidden else scored + scoring + fetched
    return StepTime(arithmetic, scored, moved + scoring, offload.passes + fetched, offload.update, total, sent)


def overlaps(config: dict[str, Any]) -> bool:
    """Whether collectives run beside the arithmetic."""
    return bool(
        lookup(config, "zero_optimization.overlap_comm")
        or (lookup(config, "zero_optimization.overlap_comm") is None and stage(config) == 3)
    )


@dataclass(frozen=True)
class OffloadTime:
    passes: float  # beside forward and backward passes
    update: float  # of the optimizer, wherever it runs


def offload_time(
    machine: Machine, config: dict[str, Any], weights: Weights, memory: EngineMemory, passes: float, *, trains: bool
) -> OffloadTime:
    """Seconds in which weights and gradients go to and fro, and in which the optimizer goes through its states."""
    b, ranks = weights.itemsize, machine.ranks
    gathers = memory.gathers if trains else memory.scoring_gathers
    disk = NVME / machine.per_node
    fetched = 0.0
    if (place := offload_device(config, "param")) != "none" and gathers is not None:
        fetched = passes * b * gathers.received / ranks / min(machine.gpu.host, disk if place == "nvme" else 1e15)
    if not trains:
        return OffloadTime(fetched, 0.0)
    share, states = weights.total(trained=True) / ranks, optimizer_states(config, weights)
    touched = FLOAT32 * share * (2 * (1 + states) + 1)  # masters and states read and written, gradients read
    place = offload_device(config, "optimizer")
    if place == "none":
        return OffloadTime(fetched, touched / machine.gpu.memory_speed)
    sent = passes * b * share / machine.gpu.host
    update = touched / (HOST_MEMORY / machine.per_node) + b * share / machine.gpu.host
    if place == "nvme":
        update += touched / disk
    return OffloadTime(fetched + sent, update)
