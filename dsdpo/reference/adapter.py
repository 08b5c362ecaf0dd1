"""Strategy `adapter`: the policy's own base weights are the reference, without its adapter or with a frozen one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsdpo.config.reference import Adapter
from dsdpo.data.batch import PreferenceBatch
from dsdpo.engine.lora import REFERENCE, AdapterSwitch, adapter_pairs, load_reference_adapter, reference_adapter_state
from dsdpo.engine.quirks.gather_trace import SecondOrder
from dsdpo.engine.scoring_mode import scoring
from dsdpo.engine.self_check import check_engine, computing_dtype
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError, ConfigError
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.base import Reference, SavedState, score_batches
from dsdpo.reference.identity import identify_reference
from dsdpo.reference.run_plan import RunPlan
from dsdpo.reference.trdpo import with_trdpo

FILE = "adapter.safetensors"  # in a checkpoint


class AdapterReference(Reference):
    """No second model: a window is scored by the policy engine with its trained adapter switched away."""

    def __init__(self, policy: TrainingEngine, *, score_tokens: int) -> None:
        """`policy` is the engine around a `ResponseScorer` of a PeftModel, with or without a reference adapter."""
        self.policy = policy
        self.score_tokens = score_tokens
        self.adapter = REFERENCE if REFERENCE in policy.module.lm.peft_config else None
        self._switch = AdapterSwitch(policy.module.lm)
        self._gathers = SecondOrder(policy)
        if self.adapter is not None and self._gathers.shared:
            raise ConfigError(
                "reference.strategy adapter: with this version of DeepSpeed, ZeRO-3 cannot alternate two adapters; set "
                "reference.strategy to separate, or use stage 2"
            )

    @classmethod
    def build(cls, plan: RunPlan, policy: TrainingEngine | None) -> Reference:
        assert policy is not None
        settings = plan.reference.settings
        assert isinstance(settings, Adapter)
        own = cls(policy, score_tokens=settings.score_tokens * plan.sequence.size)
        own.identity = identify_reference(plan, policy.module, adapter=own.adapter)
        dtype = computing_dtype(plan.policy_config, plan.run.model)
        with own._switch.use(own.adapter):
            answers = check_engine(policy, plan.train, dtype=dtype, key="reference", order=own._gathers)
        reference: Reference = own
        if settings.sync is not None:
            reference = with_trdpo(own, adapter_pairs(policy.module.lm), policy, settings.sync)
        reference.look_ahead_steps = settings.look_ahead_steps
        reference.at_start = answers
        return reference

    def score(self, batches: Sequence[PreferenceBatch]) -> list[PairLogps]:
        with scoring(self.policy), self._switch.use(self.adapter), self._gathers.recorded_apart():
            return score_batches(self.policy, batches, score_tokens=self.score_tokens)

    @contextmanager
    def answering(self) -> Iterator[TrainingEngine]:
        with self._switch.use(self.adapter):
            yield self.policy

    def model_for_flops(self) -> tuple[Any, str | None]:
        return self.policy.module.lm, self.adapter

    def state(self) -> SavedState | None:
        if self.adapter is None:
            return None
        tensors = reference_adapter_state(self.policy.module.lm)
        return None if tensors is None else SavedState(FILE, tensors)

    def load(self, folder: Path) -> None:
        if self.adapter is None:
            return
        path = folder / FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but the reference of this run has an adapter of its own")
        load_reference_adapter(self.policy, path)
