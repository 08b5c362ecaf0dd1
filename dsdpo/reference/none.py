"""Strategy `none`: no reference, for losses that have none in them (CPO, SimPO, ORPO)."""

from __future__ import annotations

from collections.abc import Sequence

from dsdpo.data.batch import PreferenceBatch
from dsdpo.engine.types import TrainingEngine
from dsdpo.objective.logps import NoLogps, PairLogps
from dsdpo.reference.base import Reference
from dsdpo.reference.run_plan import RunPlan


class NoReference(Reference):
    """Answers zeros without computing anything, so that a reward beta · logratio is beta · the policy's log-prob.

    Such rewards are TRL's for CPO and its kin.
    """

    @classmethod
    def build(cls, plan: RunPlan, policy: TrainingEngine | None) -> Reference:
        return cls()

    def score(self, batches: Sequence[PreferenceBatch]) -> list[PairLogps]:
        return [NoLogps.zeros(batch.num_pairs, device=batch.pair_ids.device) for batch in batches]
