"""One rank's share of the plan, as tensors: the micro-batches of an optimizer step, or of a stretch of a whole pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from dsdpo.data.batch import Padded, PreferenceBatch, filler
from dsdpo.data.binning import COSTS, LayoutName, MicroBatchBudget, longest_sequences, sequence_tokens
from dsdpo.data.collate import collate
from dsdpo.data.pairs import Group, Pairs
from dsdpo.data.plan import plan_pass, plan_step, rank_costs
from dsdpo.sequence_group import ALONE, SequenceGroup


@dataclass(frozen=True)
class StepBatches:
    """What this rank trains on in one optimizer step."""

    batches: tuple[PreferenceBatch, ...]  # equally many on every rank
    pairs: int  # of all ranks
    tokens: int  # of all ranks: prompt and response of each response, without padding
    epoch: float  # data position after this step
    pair_ids: np.ndarray  # (pairs,) int64, of all ranks, in the epoch's order
    lengths: np.ndarray  # (pairs, 1 + n) int32, of all ranks: tokens of prompt and responses
    loads: tuple[int, ...]  # of each share of the pairs: tokens that they cost in their layout
    computed: int  # positions that this rank computes, fillers included
    padding: int  # those of them without a token of a pair
    counts: bool = True  # False where another rank of the sequence group counts these pairs


@dataclass(frozen=True)
class BatchSource:
    """Everything that decides a rank's batches."""

    pairs: Pairs
    budget: MicroBatchBudget
    layout: LayoutName
    pad_token_id: int
    rank: int  # which share of the pairs this rank gets: its own, or that of its sequence group
    world_size: int  # shares
    sequence: SequenceGroup = ALONE  # the ranks that share the rows of this share
    first_pair_id: int = 0  # a run numbers the pairs of all its data sets through, so that an id names one pair

    def steps(
        self, *, consumed_pairs: int, steps: int, pairs_per_step: int, seed: int, shuffle: bool
    ) -> Iterator[StepBatches]:
        """The next `steps` optimizer steps from a position in the data, over epoch borders, on the CPU."""
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
                layout=self.layout,
            )
            consumed_pairs += len(plan.pair_ids)
            step_lengths = lengths[plan.pair_ids]
            # Fillers repeat a pair of the step itself: what another pair's log-probs are must not reach its gradient.
            spare = int(plan.pair_ids[np.argmin(longest_sequences(step_lengths))])
            batches = tuple(self.batch(ids, spare=spare) for ids in plan.micro_batches[self.rank])
            computed, empty = positions(batches, self.sequence)
            yield StepBatches(
                batches=batches,
                pairs=len(plan.pair_ids),
                tokens=int(sequence_tokens(step_lengths).sum()),
                epoch=consumed_pairs / len(self.pairs),
                pair_ids=plan.pair_ids + self.first_pair_id,
                lengths=step_lengths,
                loads=rank_costs(plan.micro_batches, lengths, layout=self.layout),
                computed=computed,
                padding=empty,
                counts=self.sequence.counts,
            )

    def whole_pass(self, *, batches_per_window: int = 8) -> Iterator[tuple[PreferenceBatch, ...]]:
        """Every pair once, the longest among the first, a few micro-batches at a time, on the CPU."""
        plan = plan_pass(self.pairs.lengths, world_size=self.world_size, budget=self.budget, layout=self.layout)
        micro_batches = plan[self.rank]
        for start in range(0, len(micro_batches), batches_per_window):
            yield self._collate(micro_batches[start : start + batches_per_window])

    def largest_batch(self, device: torch.device) -> PreferenceBatch:
        """A full micro-batch of the longest pairs, which weighs nothing: what does not fit memory fails here first."""
        order = self._longest_first
        costs = COSTS[self.layout](self.pairs.lengths[order])
        count = self.budget.pairs or max(1, int(np.searchsorted(costs, self.budget.token_limit, side="right")))
        return filler(self._laid_out(order[:count].tolist(), self.layout)).to(device)

    def sample(self, *, count: int = 4, longest: int | None = None) -> list[Group]:
        """A few pairs of all lengths, from the longest to the shortest.

        With `longest`, prompts lose their beginning and responses their end until a sequence has so many tokens, and
        all tokens of a response are learned.
        """
        places = np.unique(np.linspace(0, len(self.pairs) - 1, count).astype(np.int64))
        groups = self.pairs[self._longest_first[places].tolist()]
        return groups if longest is None else [shortened(group, longest) for group in groups]

    def _collate(self, micro_batches: Sequence[tuple[int, ...]]) -> tuple[PreferenceBatch, ...]:
        return tuple(self.batch(ids) for ids in micro_batches)

    def batch(self, rows: tuple[int, ...], *, spare: int | None = None) -> PreferenceBatch:
        """These rows of `pairs` as one micro-batch on the CPU; if none, a filler of `spare` or the shortest."""
        if not rows:
            shortest = self._longest_first[-1:].tolist() if spare is None else [spare]
            return filler(self._laid_out(shortest, self.layout))
        batch = self._laid_out(rows, self.layout)
        return replace(batch, pair_ids=batch.pair_ids + self.first_pair_id)

    def _laid_out(self, rows: Sequence[int], layout: LayoutName) -> PreferenceBatch:
        return collate(self.pairs[rows], layout=layout, pad_token_id=self.pad_token_id)

    @cached_property
    def _longest_first(self) -> np.ndarray:
        return np.argsort(-longest_sequences(self.pairs.lengths), kind="stable")


def shortened(group: Group, longest: int) -> Group:
    """The end of the group's prompt and the beginnings of its responses, at most `longest` tokens together."""
    prompt = group.prompt[-max(1, longest // 2) :]
    responses = tuple(response[: longest - len(prompt)] for response in group.responses)
    return replace(group, prompt=prompt, responses=responses, learned=())


def positions(batches: Sequence[PreferenceBatch], group: SequenceGroup) -> tuple[int, int]:
    """Positions of batches on the CPU that this rank computes, and those of them that it does for no pair's sake."""
    computed = empty = 0
    for batch in batches:
        own, beyond = group.computed(batch.num_tokens)
        computed += own
        if (batch.pair_ids < 0).all():
            empty += own
        else:
            empty += int((batch.attention.attention_mask == 0).sum()) if isinstance(batch.attention, Padded) else beyond
    return computed, empty
