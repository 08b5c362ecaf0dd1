"""Strategy `separate`: the reference lives in an inference-only engine under its own DeepSpeed config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsdpo.data.batch import PreferenceBatch
from dsdpo.engine.lora import POLICY
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference, score_batches


class SeparateReference(Reference):
    """A frozen model in an engine of its own, asked once per optimizer step for the whole window."""

    def __init__(self, engine: Any, *, score_tokens: int) -> None:
        self.engine = engine
        self.score_tokens = score_tokens

    def score(self, window: Sequence[PreferenceBatch]) -> list[PairLogps]:
        return score_batches(self.engine, window, score_tokens=self.score_tokens)

    def scorer(self) -> tuple[Any, str | None]:
        return self.engine.module.lm, POLICY
