"""What a run takes on every rank, node and disk, and how long a step lasts: the two engines put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dsdpo.config.reference_plan import ReferencePlan
from dsdpo.config.run import RunConfig
from dsdpo.engine.lora import POLICY, REFERENCE
from dsdpo.engine.shards import full_shape
from dsdpo.engine.zero_config import stage
from dsdpo.estimate.activations import Activations, PassSize, by_formula, rehearse
from dsdpo.estimate.checkpoint_size import CheckpointSize, checkpoint_size
from dsdpo.estimate.memory import (
    ACTIVATIONS,
    ALLOWANCE,
    FLOAT32,
    HEAD,
    WEIGHTS,
    Amounts,
    EngineMemory,
    average_memory,
    policy_memory,
    reference_memory,
)
from dsdpo.estimate.seconds import Machine, StepTime, step_time
from dsdpo.estimate.weights import Blank
from dsdpo.estimate.workload import Workload
from dsdpo.objective.chunked_head import CHUNK_BYTES, CHUNK_BYTES_ON_CPU
from dsdpo.objective.flops import ModelFlops, model_flops

# Beside tensors: what CUDA, its libraries and NCCL take of a device, a process with its libraries of the host's memory.
CONTEXT, PROCESS = 1.3 * 2**30, 3.0 * 2**30
PROCESS_ON_CPU = 0.9 * 2**30
# Of what comes and goes, that an allocator of blocks cannot give out again.
FRAGMENTATION = 0.06
SYNC_BUDGET = 512 * 2**20  # bytes that TR-DPO gathers at a time where shards do not match


@dataclass(frozen=True)
class Job:
    """A run as far as a forecast needs it: settings, both configs as resolved, blank models, pairs."""

    run: RunConfig
    reference: ReferencePlan
    policy_config: dict[str, Any]
    reference_config: dict[str, Any]
    policy: Blank
    scorer: Blank  # the reference's model; the policy's where it has none of its own
    work: Workload
    machine: Machine


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds of a run."""

    phase: str  # in which a device holds most
    policy: Amounts  # on a rank in that phase
    reference: Amounts
    phases: Mapping[str, float]  # bytes on the device by phase
    training_pass: Activations  # of one micro-batch
    held: float  # bytes of a rank on device and host between steps
    device: float  # bytes on the device at most
    capacity: float  # that it has
    host_rank: float  # bytes of host memory of a rank while it trains
    host_node: float  # of a node at most
    host_capacity: float | None
    nvme_node: float  # of a node's NVMe disk
    checkpoint: float  # bytes on the disk
    copy_node: float  # of host memory of rank 0's node besides, for a checkpoint written in the background
    model: float  # bytes of the exported model
    time: StepTime
    pairs_per_second: float

    @property
    def headroom(self) -> float:
        """Bytes left on the device; below 0: it does not fit."""
        return self.capacity - self.device

    @property
    def fits(self) -> bool:
        """Whether devices and, where their memory is known, hosts hold it."""
        return self.headroom >= 0 and (self.host_capacity is None or self.host_node <= self.host_capacity)


def forecast(job: Job) -> Forecast:
    """What the run takes."""
    memory = _memories(job)
    phases = _phases(job, *memory)
    between = phases.pop("between steps")
    cpu = job.machine.gpu.is_cpu
    totals = {name: _on_device(both[0], cpu) + _on_device(both[1], cpu) for name, both in phases.items()}
    phase = max(totals, key=lambda name: totals[name])
    policy, reference = phases[phase]
    host = max(_at(both[0], "host") + _at(both[1], "host") for both in phases.values())
    time, saved = _time(job, *memory), _checkpoint(job)
    return Forecast(
        phase=phase,
        policy=policy,
        reference=reference,
        phases=totals,
        training_pass=_activations(job, trains=True),
        held=sum(between[0].values()) + sum(between[1].values()),
        device=totals[phase],
        capacity=job.machine.gpu.memory,
        host_rank=host,
        host_node=_host_of_node(job, host),
        host_capacity=job.machine.host_memory,
        nvme_node=min(job.machine.ranks, job.machine.per_node) * sum(_at(part, "nvme") for part in (policy, reference)),
        checkpoint=saved.total(job.machine.ranks),
        copy_node=saved.of_node(job.machine.per_node, job.machine.ranks),
        model=float(job.policy.weights.itemsize * job.policy.weights.total(trained=True if _lora(job) else None)),
        time=time,
        pairs_per_second=job.work.pairs_per_step / time.total,
    )


def _memories(job: Job) -> tuple[EngineMemory, EngineMemory | None]:
    """Of the policy's engine, and of the reference's if it has one."""
    ranks = job.machine.ranks
    policy = policy_memory(
        job.policy_config,
        job.policy.weights,
        ranks=ranks,
        checkpointing=job.run.model.gradient_checkpointing,
        fused=not job.machine.gpu.is_cpu,
    )
    if not job.reference.own_engine:
        return policy, None
    return policy, reference_memory(job.reference_config, job.scorer.weights, ranks=ranks)


def _phases(job: Job, policy: EngineMemory, reference: EngineMemory | None) -> dict[str, tuple[Amounts, Amounts]]:
    """What policy and reference hold in each phase of a run, and between its steps."""
    training = _activations(job, trains=True)
    base, theirs = dict(policy.held), dict(reference.held) if reference else {}
    moving = job.reference.sync is not None and job.reference.sync.alpha < 1.0 and job.reference.has_weights
    if moving:
        shared = job.reference.shares_policy
        config = job.policy_config if shared else job.reference_config
        weights = job.policy.weights if shared else job.scorer.weights
        average = average_memory(weights, config, ranks=job.machine.ranks, trained_only=shared)
        theirs = _add(theirs, average)
    beside: Amounts = {} if job.reference.before_training else theirs
    phases: dict[str, tuple[Amounts, Amounts]] = {
        "training": (_add(base, policy.training, _shown(training)), beside),
        "optimizer": (_add(base, policy.update), beside),
    }
    if job.reference.exists:
        scoring = _shown(_activations(job, trains=False))
        if job.reference.before_training:
            assert reference is not None
            phases["precompute"] = ({}, _add(theirs, reference.scoring, scoring))
        elif reference is not None:
            phases["scoring"] = (base, _add(theirs, reference.scoring, scoring))
        else:
            phases["scoring"] = (_add(base, policy.scoring), _add(theirs, scoring))
    phases |= _loading(job, base)
    if moving and reference is not None and stage(job.policy_config) != stage(job.reference_config):
        gathered = min(SYNC_BUDGET, job.policy.weights.itemsize * job.policy.weights.total())
        if stage(job.policy_config) == 3:
            phases["sync"] = (_add(base, {("gathered layers", "device"): float(gathered)}), beside)
    found = {name: (_with_allowance(job, ours, base), others) for name, (ours, others) in phases.items()}
    return {**found, "between steps": (base, beside)}


def _loading(job: Job, policy: Amounts) -> dict[str, tuple[Amounts, Amounts]]:
    """While models in 4 bits load: each is whole on every rank's device before stage 3 takes it apart."""
    found: dict[str, tuple[Amounts, Amounts]] = {}
    if job.policy.weights.scales:
        found["loading the policy"] = ({(WEIGHTS, "device"): _whole(job.policy)}, {})
    if job.reference.own_engine and job.scorer.weights.scales:
        beside: Amounts = {} if job.reference.before_training else policy
        found["loading the reference"] = (beside, {(WEIGHTS, "device"): _whole(job.scorer)})
    return found


def _whole(blank: Blank) -> float:
    """Bytes of all weights of a model."""
    return float(blank.weights.itemsize * blank.weights.total() + blank.weights.scales)


def _with_allowance(job: Job, amounts: Amounts, held: Amounts) -> Amounts:
    """The same with what no tensor takes."""
    if job.machine.gpu.is_cpu:
        return _add(amounts, {(ALLOWANCE, "device"): PROCESS_ON_CPU})
    moving = _at(amounts, "device") - _at(held, "device")
    return _add(
        amounts, {(ALLOWANCE, "device"): CONTEXT + FRAGMENTATION * max(0.0, moving), (ALLOWANCE, "host"): PROCESS}
    )


def _activations(job: Job, *, trains: bool) -> Activations:
    """Of a training pass of the policy, or of a scoring pass of whichever model scores."""
    live = CHUNK_BYTES_ON_CPU if job.machine.gpu.is_cpu else CHUNK_BYTES
    if trains:
        size = job.work.micro_batch()
        return _rehearsed(job.policy, size, live, True, job.run.model.activation_offloading)
    return _rehearsed(job.scorer, job.work.scoring_pass(job.machine.ranks), live, False, False)


@lru_cache(maxsize=256)
def _rehearsed(blank: Blank, size: PassSize, live: int, trains: bool, kept_on_host: bool) -> Activations:
    vocabulary = blank.lm.get_output_embeddings().out_features
    chunk = max(1, live // (FLOAT32 * vocabulary))
    try:
        return rehearse(blank.lm, size, chunk=chunk, trains=trains, kept_on_host=kept_on_host)
    except (RuntimeError, NotImplementedError):  # its code asks for the content of tensors
        found = by_formula(blank.lm, size, chunk=chunk, trains=trains)
        return replace(found, kept=0, on_host=found.kept) if kept_on_host else found


def _shown(found: Activations) -> Amounts:
    """What a pass takes by part: of layers and head only the larger is there at the peak."""
    host = {(ACTIVATIONS, "host"): float(found.on_host)} if found.on_host else {}
    if found.head > found.layers:
        return {(ACTIVATIONS, "device"): float(found.kept), (HEAD, "device"): float(found.head), **host}
    return {(ACTIVATIONS, "device"): float(found.kept + found.layers), **host}


def _time(job: Job, policy: EngineMemory, reference: EngineMemory | None) -> StepTime:
    trained = _flops(job.policy, POLICY if _lora(job) else None)
    by_policy = (job.policy_config, job.policy.weights, policy, trained)
    scores = job.reference.exists and not job.reference.before_training
    by_reference = None
    if scores:
        adapter = REFERENCE if job.reference.second_adapter else None
        by_reference = (
            (job.policy_config, job.policy.weights, policy, _flops(job.policy, adapter))
            if reference is None
            else (job.reference_config, job.scorer.weights, reference, _flops(job.scorer, None))
        )
    windows = tuple({*trained.attention, *(by_reference[3].attention if by_reference else ())})
    return step_time(
        job.machine,
        job.work.step(job.machine.ranks, windows),
        policy=by_policy,
        reference=by_reference,
        checkpointing=job.run.model.gradient_checkpointing,
    )


@lru_cache(maxsize=64)
def _flops(blank: Blank, adapter: str | None) -> ModelFlops:
    return model_flops(blank.lm, adapter=adapter, shape_of=full_shape)


def _host_of_node(job: Job, while_training: float) -> float:
    """Host memory of a node at most: while models load, while they train, or while the trained one is written."""
    ranks = min(job.machine.per_node, job.machine.ranks)
    trained = ranks * while_training
    loading = 0.0
    for config, blank, there in (
        (job.policy_config, job.policy, True),
        (job.reference_config, job.scorer, job.reference.own_engine),
    ):
        if there and stage(config) != 3:  # each rank reads the whole model
            loading = max(loading, ranks * (_whole(blank) + (0.0 if job.machine.gpu.is_cpu else PROCESS)))
    exported = job.policy.weights.itemsize * job.policy.weights.total(trained=True if _lora(job) else None)
    return max(loading, trained + exported)


def _checkpoint(job: Job) -> CheckpointSize:
    """Bytes of one checkpoint."""
    weights = job.policy.weights
    return checkpoint_size(
        job.policy_config,
        job.reference_config,
        job.reference,
        trained=weights.total(trained=True),
        whole=job.scorer.weights.total(),
        itemsize=weights.itemsize,
    )


def _lora(job: Job) -> bool:
    return job.run.model.lora is not None


def _at(amounts: Amounts, place: str) -> float:
    return sum(size for (_, where), size in amounts.items() if where == place)


def _on_device(amounts: Amounts, cpu: bool) -> float:
    return _at(amounts, "device") + (_at(amounts, "host") if cpu else 0.0)


def _add(*parts: Amounts) -> dict[Any, float]:
    found: dict[Any, float] = {}
    for part in parts:
        for key, size in part.items():
            found[key] = found.get(key, 0.0) + size
    return found
