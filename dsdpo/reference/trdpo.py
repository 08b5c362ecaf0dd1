"""TR-DPO: every τ optimizer steps the reference moves, π_ref ← α·π_θ + (1 − α)·π_ref.

Source: Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment" (arXiv 2404.09656), eqs. 7 and 8.

Each rank updates its own shard of each reference parameter. Where it also holds the policy's values for that shard,
nothing is communicated; elsewhere the policy's parameters are gathered, a bounded group at a time. The reference itself
is never gathered. With α < 1 the average is kept in float32, of which a 16-bit engine holds the rounding: small updates
are lost in bfloat16 (at α = 0.01 a bfloat16 average moved a tenth of the way).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsdpo.config.reference import Sync
from dsdpo.console import every, say
from dsdpo.data.batch import PreferenceBatch
from dsdpo.distributed import rank, world_size
from dsdpo.engine.shards import (
    GATHER_BYTES,
    bytes_whole,
    finish_writes,
    full_numel,
    is_local,
    parts_of,
    readable,
    release_gathered,
    size_for_gathering,
    writable_shard,
)
from dsdpo.engine.types import InferenceEngine
from dsdpo.errors import CheckpointError, ConfigError
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference, SavedState, read_facts

ParameterPair = tuple[str, Any, Any]  # name, the policy's parameter or `MergedWeight`, the reference's parameter


class MovingAverage:
    """An exponential moving average of the policy's parameters in the reference's; each rank updates its own shards."""

    def __init__(
        self,
        matches: Sequence[ParameterPair],
        engine: InferenceEngine,
        *,
        alpha: float,
        gather: bool = False,
        budget: int = GATHER_BYTES,
    ) -> None:
        """`engine` holds the reference parameters; `gather`: gather the policy's even where shards already match."""
        self.matches, self.engine, self.alpha, self.budget = list(matches), engine, alpha, budget
        self.local = {name: is_local(source, target) and not gather for name, source, target in self.matches}
        self.averages: dict[str, Tensor] = {}  # float32 parts, where the engine's own are 16-bit
        if alpha < 1.0:
            for name, _, target in self.matches:
                if target.dtype != torch.float32:
                    with writable_shard(target) as (shard, _start):
                        self.averages[name] = shard.float().clone()

    def describe(self) -> str:
        """How the parameters are updated, in words."""
        local = sum(self.local.values())
        ways = {
            "each rank moves its own shards, nothing is communicated": local,
            f"the policy's are gathered {self.budget / 2**20:.0f} MiB at a time": len(self.local) - local,
        }
        return "; ".join(f"{count} parameters: {way}" for way, count in ways.items() if count)

    @torch.no_grad()
    def move(self) -> int:
        """Update all parameters once; the bytes of policy parameters that were gathered. Collective."""
        release_gathered(self.engine)
        received = sum(self._move_group(group) for group in self._groups())
        finish_writes()
        return received

    def _groups(self) -> Iterator[list[ParameterPair]]:
        """The pairs in groups that are all local, or whose gathered sources stay under the byte budget."""
        group: list[ParameterPair] = []
        size = 0.0
        for match in self.matches:
            name, source, _ = match
            needed = 0 if self.local[name] else sum(map(size_for_gathering, parts_of(source)))
            if group and (self.local[group[0][0]] != self.local[name] or size + needed > self.budget):
                yield group
                group, size = [], 0.0
            group.append(match)
            size += needed
        if group:
            yield group

    def _move_group(self, group: list[ParameterPair]) -> int:
        """Update a group of parameters, with the same arithmetic on both paths: results are equal bit for bit."""
        local = self.local[group[0][0]]
        with readable([source for _, source, _ in group], local=local) as values:
            for name, source, target in group:
                with writable_shard(target) as (shard, start):
                    latest = values(source, start, shard.numel()).to(shard.device)
                    if self.alpha == 1.0:
                        shard.copy_(latest)
                        continue
                    average = self.averages.get(name, shard)
                    average.copy_(average * (1.0 - self.alpha) + latest.float() * self.alpha)
                    shard.copy_(average)
        return 0 if local else sum(bytes_whole(source) for _, source, _ in group)

    def state(self) -> dict[str, Tensor]:
        """This rank's shards by name, float32 where the average is kept in float32."""
        parts = {}
        for name, _, target in self.matches:
            with writable_shard(target) as (shard, _start):
                parts[name] = self.averages.get(name, shard).detach().to("cpu", copy=True)
        return parts

    @torch.no_grad()
    def restore(self, saved: ShardReader) -> None:
        """Load what `state` returned, on another number of ranks too."""
        release_gathered(self.engine)
        for name, _, target in self.matches:
            with writable_shard(target) as (shard, start):
                part = saved.read(name, start, shard.numel())
                if name in self.averages:
                    self.averages[name].copy_(part)
                shard.copy_(part)
        finish_writes()


class ShardReader:
    """Reads any slice of a parameter from the shards that all ranks of a checkpoint saved, whatever their partition."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[int, Any] = {}  # by rank, opened when first needed
        self._open = ExitStack()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def read(self, name: str, start: int, count: int) -> Tensor:
        """(count,) elements of a parameter from element `start` on."""
        if count == 0:
            return torch.empty(0)
        # Every rank but the last few has as many elements as the first; if all had the whole, the first will do.
        size = self._slice(0, name).get_shape()[0]
        pieces = []
        while count:
            owner, offset = divmod(start, size)
            taken = min(count, size - offset)
            pieces.append(self._slice(owner, name)[offset : offset + taken])
            start, count = start + taken, count - taken
        return torch.cat(pieces)

    def _slice(self, of_rank: int, name: str) -> Any:
        if of_rank not in self._files:
            path = self.folder / f"rank-{of_rank}.safetensors"
            self._files[of_rank] = self._open.enter_context(safe_open(path, framework="pt"))
        return self._files[of_rank].get_slice(name)


def match_parameters(sources: Mapping[str, Any], reference: nn.Module) -> list[ParameterPair]:
    """The policy's parameters (by the reference's names) beside the reference's.

    Raises `ConfigError` where they do not correspond.
    """
    targets = dict(reference.named_parameters())
    odd = sorted(sources.keys() ^ targets.keys()) + [
        name
        for name in sources.keys() & targets.keys()
        if full_numel(parts_of(sources[name])[0]) != full_numel(targets[name])
    ]
    if odd:
        raise ConfigError(
            "reference.sync_ref_model: the reference cannot move towards a policy of another architecture "
            f"({len(odd)} parameters do not correspond, the first is {odd[0]}); give reference.path a model of the "
            "policy's architecture, or set reference.sync_ref_model to false"
        )
    return [(name, source, targets[name]) for name, source in sources.items()]


class MovingReference(Reference):
    """A reference that scores like the one it wraps, with parameters moved towards the policy every `every` steps."""

    def __init__(self, inner: Reference, average: MovingAverage, *, every: int) -> None:
        self.inner, self.average = inner, average
        self.every = self.sync_every = every
        self.identity = inner.identity
        self.syncs = self.age = 0
        self.last_sync: dict[str, float] = {}

    def score(self, batches: Sequence[PreferenceBatch]) -> list[PairLogps]:
        return self.inner.score(batches)

    def answering(self) -> AbstractContextManager[InferenceEngine | None]:
        return self.inner.answering()

    def model_for_flops(self) -> tuple[Any, str | None] | None:
        return self.inner.model_for_flops()

    def after_step(self, step: int) -> None:
        self.age += 1
        if not self.moves_after(step):
            return
        started = time.perf_counter()
        received = self.average.move()
        self.syncs, self.age = self.syncs + 1, 0
        self.last_sync = {"time/last_sync_s": time.perf_counter() - started, "reference/sync_bytes": float(received)}

    def metrics(self) -> dict[str, float]:
        return {"reference/syncs": float(self.syncs), "reference/age_steps": float(self.age), **self.last_sync}

    def state(self) -> SavedState:
        facts: dict[str, Any] = {"syncs": self.syncs, "age": self.age, "world_size": world_size()}
        facts["sync_bytes"] = self.last_sync.get("reference/sync_bytes")
        return SavedState(f"rank-{rank()}.safetensors", self.average.state(), facts)

    def load(self, folder: Path) -> None:
        try:
            facts = read_facts(folder / "rank-0.safetensors")
            with ShardReader(folder) as parts:
                self.average.restore(parts)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: the moving reference cannot be read: {error}") from error
        self.syncs, self.age = facts["syncs"], facts["age"]
        if facts.get("sync_bytes") is not None:
            self.last_sync = {"reference/sync_bytes": facts["sync_bytes"]}


def with_trdpo(
    reference: Reference, matches: list[ParameterPair], engine: InferenceEngine, sync: Sync
) -> MovingReference:
    """The reference, whose parameters `engine` holds, moved towards the policy as `sync` says."""
    average = MovingAverage(matches, engine, alpha=sync.alpha)
    say(f"reference moves {every(sync.every, 'step')}: {average.describe()}")
    return MovingReference(reference, average, every=sync.every)
