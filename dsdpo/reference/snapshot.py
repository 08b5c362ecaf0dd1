"""Strategy `policy_snapshot`: copy-free TR-DPO with α = 1.

Where the reference is the policy as it was up to τ steps ago, it needs no weights of its own: at that very moment the
policy itself scores the pairs of the next τ steps, and the held-out pairs if their turn comes before the next moment.
Only their log-probs are kept. Source: Gorbatovski et al. 2024 (arXiv 2404.09656), the hard update.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dsdpo.config.reference import Snapshot
from dsdpo.data.batch import PreferenceBatch
from dsdpo.distributed import rank, world_size
from dsdpo.engine.build import device
from dsdpo.engine.lora import POLICY
from dsdpo.engine.scoring_mode import scoring
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference, SavedState, read_facts, score_batches
from dsdpo.reference.identity import identify_reference
from dsdpo.reference.run_plan import RunPlan


class SnapshotReference(Reference):
    """Answers from what the policy said at the last snapshot: one at the start, then one every `every` steps."""

    reads_all_ranks = True

    def __init__(self, policy: TrainingEngine, plan: RunPlan, *, every: int, score_tokens: int) -> None:
        """`policy` is the training engine; `plan` says what training and evaluations ask for, and when."""
        self.policy, self.plan, self.score_tokens = policy, plan, score_tokens
        self.every = self.sync_every = every
        self._ids: torch.Tensor | None = None  # (M,) int64, ascending; None before the first snapshot
        self._logps: PairLogps  # (M,) each, in their order
        self.syncs, self.age, self.seconds, self._step = 0, 0, 0.0, 0

    @classmethod
    def build(cls, plan: RunPlan, policy: TrainingEngine | None) -> Reference:
        assert policy is not None
        settings = plan.reference.settings
        assert isinstance(settings, Snapshot)
        score_tokens = settings.score_tokens * plan.sequence.size
        reference = cls(policy, plan, every=settings.sync.every, score_tokens=score_tokens)
        reference.identity = identify_reference(plan, policy.module, adapter=POLICY if plan.run.model.lora else None)
        return reference

    def score_until_next_sync(self, step: int) -> None:
        """Score everything needed up to the next sync with the policy as it is after `step`. Collective."""
        started = time.perf_counter()
        self._step = step
        ids, logps = [], []
        # An evaluation after step 0 comes before any training; one after a sync's step comes before that sync.
        with scoring(self.policy):
            for batches in self._batches_until(step, step + self.every, first_evaluation=step + 1 if step else 0):
                ids += [batch.pair_ids for batch in batches]
                logps += score_batches(self.policy, batches, score_tokens=self.score_tokens)
        if not ids:  # after the last step
            return
        self._ids, order = torch.cat(ids).sort()
        self._logps = PairLogps.cat(logps).take(order)
        self.age, self.seconds = 0, time.perf_counter() - started

    def _batches_until(self, step: int, last: int, *, first_evaluation: int) -> Iterator[Sequence[PreferenceBatch]]:
        """This rank's batches of the steps after `step` up to `last`, and of evaluations from `first_evaluation` on."""
        yield from (window.batches for window in islice(self.plan.training_windows(device(), step), last - step))
        if any(self.plan.evaluates_after(later) for later in range(first_evaluation, last + 1)):
            yield from self.plan.held_out_windows(device())

    def score(self, batches: Sequence[PreferenceBatch]) -> list[PairLogps]:
        if self._ids is None:  # the start of a run that was not resumed
            self.score_until_next_sync(0)
        assert self._ids is not None
        # A filler pair, id -1, gets the first row: anything finite does for what weighs nothing.
        found = (self._logps.take(torch.searchsorted(self._ids, batch.pair_ids)) for batch in batches)
        return [logps.narrowed(batch.group_size) for logps, batch in zip(found, batches, strict=True)]

    def model_for_flops(self) -> tuple[Any, str | None]:
        return self.policy.module.lm, POLICY

    def after_step(self, step: int) -> None:
        self.age, self._step = self.age + 1, step
        if self.moves_after(step):
            self.syncs += 1
            self.score_until_next_sync(step)

    def state(self) -> SavedState:
        assert self._ids is not None
        table = self._logps.columns() | {"ids": self._ids}
        facts = {"syncs": self.syncs, "age": self.age, "step": self._step, "world_size": world_size()}
        copies = {name: column.to("cpu", copy=True) for name, column in table.items()}
        return SavedState(f"rank-{rank()}.safetensors", copies, facts)

    def load(self, folder: Path) -> None:
        """Take up what every rank saved: other ranks, or other micro-batches, ask for other pairs than this one did."""
        try:
            facts = {name: int(value) for name, value in read_facts(folder / "rank-0.safetensors").items()}
            # This rank's own first: of a pair that was scored twice it goes on with the answer that it has given.
            ranks = sorted(range(facts["world_size"]), key=lambda other: other != rank())
            tables = [load_file(folder / f"rank-{other}.safetensors") for other in ranks]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: the snapshot cannot be read: {error}") from error
        table = {name: torch.cat([part[name] for part in tables]).to(device()) for name in tables[0]}
        self._ids, order = table.pop("ids").sort(stable=True)
        self._logps = PairLogps.of_columns(table).take(order)
        self.syncs, self.age, self._step = facts["syncs"], facts["age"], facts["step"]
        self._check_complete(folder)

    def _check_complete(self, folder: Path) -> None:
        """Raise `CheckpointError` if a pair will be asked for of which the snapshot says nothing."""
        last = self._step - self._step % self.every + self.every
        assert self._ids is not None
        for batches in self._batches_until(self._step, last, first_evaluation=self._step + 1):
            ids = torch.cat([batch.pair_ids for batch in batches])
            absent = ids[(ids >= 0) & ~torch.isin(ids, self._ids)]
            if len(absent):
                raise CheckpointError(
                    f"{folder}: the snapshot has nothing on pair {int(absent[0])}, which is needed before the next "
                    "sync: resume with the data, batch.pairs_per_step, evaluation and ref_model_sync_steps that it had "
                    "(one of an older dsdpo cannot be resumed if an evaluation follows the step of a sync)"
                )

    def metrics(self) -> dict[str, float]:
        return {
            "reference/syncs": float(self.syncs),
            "reference/age_steps": float(self.age),
            "reference/sync_bytes": 0.0,
            "time/last_sync_s": self.seconds,
        }
