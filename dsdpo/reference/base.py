"""The one operation every reference strategy offers, and the one function that performs it on an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.collate import group_by_tokens, merge
from dsdpo.data.steps import StepBatches
from dsdpo.distributed import max_over_ranks
from dsdpo.objective.logps import PairLogps, pair_logps
from dsdpo.reference.identity import ReferenceIdentity
from dsdpo.reference.run_plan import RunPlan


class Reference(ABC):
    """The anchor π_ref: log-probs of a window's pairs under it, whoever holds its weights."""

    identity: ReferenceIdentity | None = None
    """Which reference this is: saved with every checkpoint. None where nobody has identified it."""

    @classmethod
    def build(cls, plan: RunPlan, policy: Any) -> Reference:
        """The reference of a run, for the classes in `config.reference.STRATEGIES`. Collective.

        `policy` is the training engine, warmed up; None for a strategy that is scored before training.
        """
        raise NotImplementedError(f"{cls.__name__} is made around another reference")

    @abstractmethod
    def score(self, window: Sequence[PreferenceBatch]) -> list[PairLogps]:
        """One `PairLogps` per batch, without gradient. Collective, as often on every rank."""

    def looking_ahead(self, windows: Iterable[StepBatches], step: int) -> Iterable[StepBatches]:
        """The windows of the steps after `step`, of which a reference may see several before it is asked."""
        return windows

    def scorer(self) -> tuple[Any, str | None] | None:
        """The model that scores training pairs as training goes, and its adapter in use; None: nothing is computed."""
        return None

    def after_step(self, step: int) -> None:  # noqa: B027 (a frozen reference has nothing to do)
        """Called after optimizer step number `step`, counted from 1; where a moving reference moves. Collective."""

    def moves_after(self, step: int) -> bool:
        """Whether `after_step(step)` will make it another reference."""
        return False

    def metrics(self) -> dict[str, float]:
        """What to record of the reference itself beside the training metrics, under its full names."""
        return {}

    def save(self, folder: Path) -> None:  # noqa: B027 (a frozen reference has no state)
        """Write into `folder` whatever cannot be rebuilt from the run's config. Collective."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Take up the state that `save` wrote. Collective."""


@torch.no_grad()
def score_batches(
    model: Callable[..., Tensor], window: Sequence[PreferenceBatch], *, score_tokens: int
) -> list[PairLogps]:
    """Log-probs of a window, in as few forward passes of at most `score_tokens` tokens as it takes. Collective.

    Under ZeRO-3 each pass gathers all weights, so a window that fits one pass costs one gather per layer however many
    micro-batches it holds. A rank with less to score repeats its last group, or ranks would hang in a gather.
    """
    groups = group_by_tokens(window, score_tokens)
    passes = max_over_ranks(len(groups), window[0].input_ids.device)
    scored: list[PairLogps] = []
    for index in range(passes):
        group = groups[min(index, len(groups) - 1)]
        logps = pair_logps(model, merge(group))
        if index < len(groups):
            scored += logps.split([batch.num_pairs for batch in group])
    return scored
