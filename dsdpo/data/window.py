"""One rank's share of the plan, as tensors: the micro-batches of an optimizer step, or of a stretch of a whole pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dsdpo.data.batch import PreferenceBatch, collate_padded, filler
from dsdpo.data.pairs import Pairs
from dsdpo.data.plan import MicroBatchBudget, plan_pass, plan_step


@dataclass(frozen=True)
class Window:
    """What this rank trains on in one optimizer step."""

    batches: tuple[PreferenceBatch, ...]  # equally many on every rank
    pairs: int  # of all ranks
    tokens: int  # of all ranks: prompt and response of both sides, without padding
    epoch: float  # data position after this step


@dataclass(frozen=True)
class Windows:
    """Everything that decides a rank's batches."""

    pairs: Pairs
    budget: MicroBatchBudget
    pad_token_id: int
    rank: int
    world_size: int
    first_pair_id: int = 0  # a run numbers the pairs of all its data sets through, so that an id names one pair

    def steps(
        self, device: torch.device, *, consumed_pairs: int, steps: int, pairs_per_step: int, seed: int, shuffle: bool
    ) -> Iterator[Window]:
        """The next `steps` optimizer steps from a position in the data, over epoch borders."""
        lengths = self.pairs.lengths
        for _ in range(steps):
            plan = plan_step(
                lengths,
                consumed_pairs=consumed_pairs,
                pairs_per_step=pairs_per_step,
                world_size=self.world_size,
                budget=self.budget,
                seed=seed,
                shuffle=shuffle,
            )
            consumed_pairs += len(plan.pair_ids)
            step_lengths = lengths[plan.pair_ids]
            yield Window(
                batches=self._collate(plan.micro_batches[self.rank], device),
                pairs=len(plan.pair_ids),
                tokens=int(step_lengths.sum() + step_lengths[:, 0].sum()),
                epoch=consumed_pairs / len(self.pairs),
            )

    def whole_pass(self, device: torch.device, *, batches_per_window: int = 8) -> Iterator[tuple[PreferenceBatch, ...]]:
        """Every pair once, sorted by length, a few micro-batches at a time."""
        micro_batches = plan_pass(self.pairs.lengths, world_size=self.world_size, budget=self.budget)[self.rank]
        for start in range(0, len(micro_batches), batches_per_window):
            yield self._collate(micro_batches[start : start + batches_per_window], device)

    def largest_batch(self, device: torch.device) -> PreferenceBatch:
        """A full micro-batch of the longest pairs, which weighs nothing: what does not fit memory fails here first."""
        order = self.pairs.lengths.sum(1).argsort()[::-1]
        longest = self.pairs.lengths[order[0]]
        row = int(longest[0] + longest[1:].max())
        count = self.budget.pairs or max(1, (self.budget.tokens or 0) // (2 * row))
        return filler(self.pairs[order[:count].tolist()], pad_token_id=self.pad_token_id).to(device)

    def _collate(self, micro_batches: Sequence[tuple[int, ...]], device: torch.device) -> tuple[PreferenceBatch, ...]:
        return tuple(self.batch(ids).to(device) for ids in micro_batches)

    def batch(self, rows: tuple[int, ...]) -> PreferenceBatch:
        """These rows of `pairs` as one micro-batch on the CPU, a filler if there are none."""
        if rows:
            batch = collate_padded(self.pairs[rows], pad_token_id=self.pad_token_id)
            return replace(batch, pair_ids=batch.pair_ids + self.first_pair_id)
        return filler(self.pairs[[self._shortest]], pad_token_id=self.pad_token_id)

    @cached_property
    def _shortest(self) -> int:
        return int(self.pairs.lengths.sum(1).argmin())
