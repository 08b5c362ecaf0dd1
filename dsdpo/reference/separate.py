"""Strategy `separate`: the reference lives in an inference-only engine under its own DeepSpeed config."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dsdpo.config.reference import Separate
from dsdpo.data.batch import PreferenceBatch
from dsdpo.engine.lora import POLICY, merged_parameters
from dsdpo.engine.types import InferenceEngine, TrainingEngine
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference, build_checked_reference, score_batches
from dsdpo.reference.identity import identify_reference
from dsdpo.reference.run_plan import RunPlan
from dsdpo.reference.trdpo import match_parameters, with_trdpo


class SeparateReference(Reference):
    """A frozen model in an engine of its own, asked once per optimizer step for the whole window."""

    def __init__(self, engine: InferenceEngine, *, score_tokens: int) -> None:
        self.engine = engine
        self.score_tokens = score_tokens

    @classmethod
    def build(cls, plan: RunPlan, policy: TrainingEngine | None) -> Reference:
        assert policy is not None
        settings, model = plan.reference.settings, plan.reference.model
        assert isinstance(settings, Separate)
        engine, answers = build_checked_reference(plan, policy)
        reference: Reference = cls(engine, score_tokens=settings.score_tokens * plan.sequence.size)
        reference.identity = identify_reference(plan, engine.module, adapter=POLICY if model.lora else None)
        if settings.sync is not None:
            merges = model.lora is None and plan.run.model.lora is not None
            sources = merged_parameters(policy.module) if merges else dict(policy.module.named_parameters())
            reference = with_trdpo(reference, match_parameters(sources, engine.module), engine, settings.sync)
        reference.look_ahead_steps = settings.look_ahead_steps
        reference.at_start = answers
        return reference

    def score(self, batches: Sequence[PreferenceBatch]) -> list[PairLogps]:
        return score_batches(self.engine, batches, score_tokens=self.score_tokens)

    def answering(self) -> AbstractContextManager[InferenceEngine]:
        return nullcontext(self.engine)

    def model_for_flops(self) -> tuple[Any, str | None]:
        return self.engine.module.lm, POLICY
