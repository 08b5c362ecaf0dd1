"""Strategy `policy_snapshot`: copy-free TR-DPO with α = 1.

Where the reference is the policy as it was up to τ steps ago, it needs no weights of its own: at that very moment the
policy itself scores the pairs of the next τ steps, and the held-out pairs if their turn comes before the next moment.
Only their log-probs are kept. Source: Gorbatovski et al. 2024 (arXiv 2404.09656), the hard update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.window import Window
from dsdpo.distributed import rank, world_size
from dsdpo.engine.build import device
from dsdpo.errors import CheckpointError
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference, score_window


class SnapshotReference(Reference):
    """Answers from what the policy said at the last snapshot: one at the start, then one every `every` steps."""

    def __init__(
        self,
        policy: Any,
        *,
        training: Callable[[int], Iterable[Window]],
        held_out: Callable[[], Iterable[Sequence[PreferenceBatch]]],
        evaluates_after: Callable[[int], bool],
        every: int,
        score_tokens: int,
    ) -> None:
        """`policy` is the training engine; `training(step)` yields the windows of the steps after that one.

        `held_out` yields the windows of an evaluation, which `evaluates_after(step)` says to follow a step (0: start).
        """
        self.policy, self.every, self.score_tokens = policy, every, score_tokens
        self._training, self._held_out, self._evaluates_after = training, held_out, evaluates_after
        self._ids: torch.Tensor | None = None  # (M,) int64, ascending; None before the first snapshot
        self._logps: PairLogps  # (M,) each, in their order
        self.syncs, self.age, self.seconds = 0, 0, 0.0

    def take(self, step: int) -> None:
        """Score with the policy as it is after `step` all that is asked for before the next snapshot. Collective."""
        started = time.perf_counter()
        windows: Iterator[Sequence[PreferenceBatch]] = (
            window.batches for window in islice(self._training(step), self.every)
        )
        # An evaluation after the same step as the next snapshot is answered by that one.
        if any(self._evaluates_after(later) for later in range(step, step + self.every)):
            windows = chain(windows, self._held_out())
        ids, logps = [], []
        self.policy.eval()
        for window in windows:
            ids += [batch.pair_ids for batch in window]
            logps += score_window(self.policy, window, score_tokens=self.score_tokens)
        self.policy.train()
        if not ids:  # after the last step
            return
        self._ids, order = torch.cat(ids).sort()
        fields = zip(*(vars(answer).values() for answer in logps), strict=True)
        self._logps = PairLogps(*(torch.cat(parts)[order] for parts in fields))
        self.age, self.seconds = 0, time.perf_counter() - started

    def score(self, window: Sequence[PreferenceBatch]) -> list[PairLogps]:
        if self._ids is None:  # the start of a run that was not resumed
            self.take(0)
        return [self._look_up(batch) for batch in window]

    def _look_up(self, batch: PreferenceBatch) -> PairLogps:
        # A filler pair, id -1, gets the first row: anything finite does for what weighs nothing.
        assert self._ids is not None
        rows = torch.searchsorted(self._ids, batch.pair_ids)
        return PairLogps(*(field[rows] for field in vars(self._logps).values()))

    def after_step(self, step: int) -> None:
        self.age += 1
        if step % self.every == 0:
            self.syncs += 1
            self.take(step)

    def save(self, folder: Path) -> None:
        assert self._ids is not None
        folder.mkdir(parents=True, exist_ok=True)
        table = {name: field.cpu() for name, field in vars(self._logps).items()} | {"ids": self._ids.cpu()}
        facts = {"syncs": str(self.syncs), "age": str(self.age), "world_size": str(world_size())}
        save_file(table, folder / f"rank-{rank()}.safetensors", metadata=facts)

    def load(self, folder: Path) -> None:
        path = folder / f"rank-{rank()}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
            table = {name: tensor.to(device()) for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: the snapshot cannot be read: {error}") from error
        self._ids = table.pop("ids")
        self._logps = PairLogps(**table)
        self.syncs, self.age = int(facts["syncs"]), int(facts["age"])

    def metrics(self) -> dict[str, float]:
        return {
            "reference/syncs": float(self.syncs),
            "reference/age_steps": float(self.age),
            "reference/sync_bytes": 0.0,
            "time/sync_s": self.seconds,
        }
