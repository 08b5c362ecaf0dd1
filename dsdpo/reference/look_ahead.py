"""Several steps' windows scored at once, by a reference that does not move meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dsdpo.config.reference import Sync
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.steps import StepBatches
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference


class LookAhead(Reference):
    """Asks the reference it wraps once for `steps` steps: under ZeRO-3 its weights are then gathered once for all.

    Only where they fit `score_tokens`, that is: scoring makes as many passes as it takes. Never beyond a sync, which is
    every `sync_every` steps of a reference that moves.
    """

    def __init__(self, inner: Reference, *, steps: int, sync_every: int | None) -> None:
        self.inner, self.steps, self.sync_every = inner, steps, sync_every
        self.identity = inner.identity
        self._ahead: list[Sequence[PreferenceBatch]] = []  # windows that have been looked at and not been asked for
        self._answers: list[PairLogps] = []  # for their batches, once the first of them has been asked for

    def looking_ahead(self, windows: Iterable[StepBatches], step: int) -> Iterator[StepBatches]:
        windows = iter(windows)
        while True:
            size = min(self.steps, self.sync_every - step % self.sync_every) if self.sync_every else self.steps
            group = list(islice(windows, size))
            if not group:
                return
            self._ahead, self._answers = [window.batches for window in group], []
            step += len(group)
            yield from group

    def score(self, window: Sequence[PreferenceBatch]) -> list[PairLogps]:
        if not self._ahead or window is not self._ahead[0]:  # an evaluation's
            return self.inner.score(window)
        self._answers = self._answers or self.inner.score([batch for ahead in self._ahead for batch in ahead])
        count = len(self._ahead.pop(0))
        answers, self._answers = self._answers[:count], self._answers[count:]
        return answers

    def scorer(self) -> tuple[Any, str | None] | None:
        return self.inner.scorer()

    def moves_after(self, step: int) -> bool:
        return self.inner.moves_after(step)

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)

    def metrics(self) -> dict[str, float]:
        return self.inner.metrics()

    def save(self, folder: Path) -> None:
        self.inner.save(folder)

    def load(self, folder: Path) -> None:
        self.inner.load(folder)


def looking_ahead(reference: Reference, *, steps: int, sync: Sync | None) -> Reference:
    """The reference, asked for as many steps at a time as the run says."""
    return reference if steps == 1 else LookAhead(reference, steps=steps, sync_every=sync.every if sync else None)
