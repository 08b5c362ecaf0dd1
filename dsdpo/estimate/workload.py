"""The sizes of a run's passes, from the lengths of its pairs and the settings that cut them into micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dsdpo.config.run import RunConfig
from dsdpo.data.binning import COSTS, LayoutName, MicroBatchBudget, longest_sequences
from dsdpo.estimate.activations import PassSize
from dsdpo.estimate.seconds import StepWork
from dsdpo.objective.flops import Window, Work, pair_work


@dataclass(frozen=True, eq=False)
class Workload:
    """What a run goes through, as far as memory and time depend on it."""

    lengths: np.ndarray  # (n, 1 + responses) tokens of prompt and responses, of the run's pairs or of a few like them
    layout: LayoutName
    budget: MicroBatchBudget
    pairs_per_step: int  # of all ranks
    score_tokens: int
    look_ahead: int  # steps that the reference scores together
    sharing: int = 1  # ranks that share a row's tokens, of which each has as many of its own

    def micro_batch(self) -> PassSize:
        """The largest micro-batch: the longest pairs, as many as the budget allows. Runs try it before they start."""
        return self._size(self._longest_first[: self._pairs_of_micro_batch()])

    def scoring_pass(self, ranks: int) -> PassSize:
        """The largest pass without gradient: a rank's micro-batches together, as far as score_tokens allows."""
        at_once = self._pairs_of_micro_batch()
        there = math.ceil(self.pairs_per_step * self.look_ahead * self.sharing / ranks)
        together = max(1, self.score_tokens // max(1, self._size(self._longest_first[:at_once]).tokens))
        return self._size(self._longest_first[: max(1, min(there, at_once * together))])

    def step(self, ranks: int, windows: tuple[Window, ...]) -> StepWork:
        """A rank's mean share of a step, in layers that see so far; ranks that share a row have at least one pair."""
        pairs = max(self.pairs_per_step / ranks, 1 / self.sharing)
        all_of_them = pair_work(self.lengths, windows)
        share = pairs / len(self.lengths)
        work = Work(
            all_of_them.tokens * share,
            {window: attended * share for window, attended in all_of_them.attended.items()},
            all_of_them.scored * share,
        )
        cost = float(COSTS[self.layout](self.lengths)[-1]) * share if self.layout == "packed" else None
        if cost is None:
            sizes = longest_sequences(self.lengths)
            cost = float(sizes.mean()) * (self.lengths.shape[1] - 1) * pairs
        if self.budget.pairs:
            micro_batches = math.ceil(pairs * self.sharing / self.budget.pairs)
        else:
            micro_batches = max(1, math.ceil(cost * self.sharing / self.budget.token_limit))
        passes = max(1, math.ceil(cost * self.look_ahead / self.score_tokens)) / self.look_ahead
        return StepWork(work, micro_batches, passes, self.pairs_per_step)

    def _pairs_of_micro_batch(self) -> int:
        if self.budget.pairs:
            return self.budget.pairs
        costs = COSTS[self.layout](self._longest_first)
        return max(1, int(np.searchsorted(costs, self.budget.token_limit, side="right")))

    @property
    def _longest_first(self) -> np.ndarray:
        """As many lengths as any pass needs, the longest first; few pairs stand for many by repeating them."""
        order = np.argsort(-longest_sequences(self.lengths), kind="stable")
        ordered = self.lengths[order]
        smallest = max(1, int(ordered[-1].sum()) - (ordered.shape[1] - 1))
        limit = max(self.budget.token_limit if self.budget.pairs is None else 0, self.score_tokens)
        wanted = max(self.budget.pairs or 0, int(limit // smallest) + 1)
        repeats = max(1, math.ceil(min(wanted, 10_000) / len(ordered)))
        return np.repeat(ordered, repeats, axis=0)

    def _size(self, lengths: np.ndarray) -> PassSize:
        responses = lengths[:, 1:]
        scored = int(responses.sum())
        if self.layout == "padded":
            rows, width = responses.size, int(longest_sequences(lengths).max())
            return PassSize(rows, width, scored, rows * width)
        tokens = int(COSTS["packed"](lengths)[-1])
        keys = int(((lengths[:, :1] + responses - 1) * (responses > 0)).sum())
        share = self.sharing  # attention is over the whole row, with as small a part of the heads
        return PassSize(1, -(-tokens // share), -(-scored // share), -(-max(keys, tokens) // share))


def workload(run: RunConfig, lengths: np.ndarray, layout: LayoutName) -> Workload:
    """Of a run with pairs of these lengths."""
    return Workload(
        lengths=lengths,
        layout=layout,
        budget=MicroBatchBudget(
            tokens=run.batch.tokens_per_micro_batch * run.distributed.sequence_parallel,
            pairs=run.batch.pairs_per_micro_batch,
        ),
        pairs_per_step=run.batch.pairs_per_step,
        score_tokens=run.reference.score_tokens,
        look_ahead=run.reference.look_ahead_steps,
        sharing=run.distributed.sequence_parallel,
    )
