"""What every reference strategy offers, and the function that scores batches on an engine."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsdpo.data.batch import PreferenceBatch, filler
from dsdpo.data.collate import group_by_tokens, merge
from dsdpo.data.steps import StepBatches
from dsdpo.distributed import max_over_ranks
from dsdpo.engine.build import build_reference
from dsdpo.engine.self_check import Answers, check_engine, computing_dtype
from dsdpo.engine.types import InferenceEngine, TrainingEngine
from dsdpo.objective.logps import PairLogps, pair_logps
from dsdpo.objective.token_weights import TokenWeights
from dsdpo.phases import Phase, untimed
from dsdpo.reference.identity import ReferenceIdentity
from dsdpo.reference.run_plan import RunPlan

FACTS = "moving"  # the metadata of a state's file, as JSON


@dataclass(frozen=True)
class SavedState:
    """A file of a reference's state: on the CPU, and not to be changed by anyone any more."""

    name: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into `folder`. Raises OSError or SafetensorError."""
        folder.mkdir(parents=True, exist_ok=True)
        # One entry: safetensors writes several in any order, and saving twice would give different bytes.
        save_file(self.tensors, folder / self.name, metadata={FACTS: json.dumps(self.facts)} if self.facts else None)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a file that `SavedState.write` wrote. Raises OSError, ValueError, KeyError or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return json.loads(metadata[FACTS]) if FACTS in metadata else {**metadata}


class Reference(ABC):
    """The reference model π_ref: log-probs of pairs under it, whichever engine, adapter or table has them."""

    identity: ReferenceIdentity | None = None
    """Which reference this is: saved with every checkpoint. None: it has none."""
    look_ahead_steps: int = 1
    """Optimizer steps scored at once: under ZeRO-3 the weights are gathered once for all that fit a pass."""
    sync_every: int | None = None
    """Optimizer steps between two moves towards the policy; None: it does not move."""

    reads_all_ranks = False
    """Whether `load` reads what every rank has saved, even on as many ranks."""

    at_start: Answers | None = None
    """What it answered on a few pairs when it was built; None where nothing was computed."""

    @classmethod
    def build(cls, plan: RunPlan, policy: TrainingEngine | None) -> Reference:
        """The reference of a run, for the classes in `config.reference.STRATEGIES`. Collective.

        `policy` is the training engine, warmed up; None for a strategy that is scored before training.
        """
        raise NotImplementedError(f"{cls.__name__} wraps another reference")

    @abstractmethod
    def score(self, batches: Sequence[PreferenceBatch]) -> list[PairLogps]:
        """One `PairLogps` per batch, without gradient. Collective, as often on every rank."""

    def along(
        self, steps: Iterable[StepBatches], *, after: int, phase: Phase = untimed
    ) -> Iterator[tuple[StepBatches, list[PairLogps]]]:
        """Each of the steps after step `after`, with the log-probs of its batches. Collective.

        Scores `look_ahead_steps` steps at once, never beyond a sync; scoring is timed as the phase "reference". Take
        the step and call `after_step` before asking for the next.
        """
        steps = iter(steps)
        while group := list(islice(steps, self._steps_until_scored(after))):
            with phase("reference"):
                answers = self.score([batch for step in group for batch in step.batches])
            for step in group:
                mine, answers = answers[: len(step.batches)], answers[len(step.batches) :]
                yield step, mine
            after += len(group)

    def _steps_until_scored(self, after: int) -> int:
        if self.sync_every is None:
            return self.look_ahead_steps
        return min(self.look_ahead_steps, self.sync_every - after % self.sync_every)

    def model_for_flops(self) -> tuple[Any, str | None] | None:
        """The model that scores training pairs as training goes, and its adapter in use; None: nothing is computed."""
        return None

    def answering(self) -> AbstractContextManager[InferenceEngine | None]:
        """A block in which an engine, given by it, computes as the reference; None: no weights of it are there."""
        return nullcontext(None)

    def after_step(self, step: int) -> None:  # noqa: B027 (a frozen reference has nothing to do)
        """Called after optimizer step number `step`, counted from 1; where a moving reference moves. Collective."""

    def moves_after(self, step: int) -> bool:
        """Whether `after_step(step)` will move it towards the policy."""
        return self.sync_every is not None and step % self.sync_every == 0

    def metrics(self) -> dict[str, float]:
        """Metrics of the reference itself, by their full names."""
        return {}

    def state(self) -> SavedState | None:
        """This rank's part of what cannot be rebuilt from the run's settings, as copies; None: nothing. Collective."""
        return None

    def load(self, folder: Path) -> None:  # noqa: B027 (a frozen reference has no state)
        """Load the files of `state` that all ranks wrote into `folder`. Collective."""


def build_checked_reference(plan: RunPlan, policy: TrainingEngine | None = None) -> tuple[InferenceEngine, Answers]:
    """The reference in an engine of its own, found to be right, and what it answered on a few pairs. Collective.

    With a `policy` that has not trained yet, weights that both start from are copied from it instead of being read.
    """
    model = plan.reference.model
    engine = build_reference(
        model,
        plan.reference_config,
        layout=plan.train.layout,
        token_weights=TokenWeights.of(plan.run.loss),
        longest=plan.longest,
        sequence=plan.sequence,
        like=policy.module.lm if policy is not None and _same_weights(plan) else None,
    )
    dtype = computing_dtype(plan.reference_config, model)
    key = "reference.path" if plan.run.reference.path else "reference"
    return engine, check_engine(engine, plan.train, dtype=dtype, key=key)


def _same_weights(plan: RunPlan) -> bool:
    ours, theirs = plan.run.model, plan.reference.model
    return (ours.path, ours.revision) == (theirs.path, theirs.revision)


@torch.no_grad()
def score_batches(
    model: Callable[..., Tensor],
    batches: Sequence[PreferenceBatch],
    *,
    score_tokens: int,
    ask: Callable[[Callable[..., Tensor], PreferenceBatch], PairLogps] = pair_logps,
) -> list[PairLogps]:
    """Log-probs of some batches, in as few forward passes of at most `score_tokens` tokens as it takes. Collective.

    Under ZeRO-3 each pass gathers all weights, so batches that fit one pass cost one gather per layer however many they
    are. A rank with less to score repeats its last group as fillers, or ranks would hang in a gather. `ask` makes the
    passes.
    """
    groups = group_by_tokens(batches, score_tokens)
    passes = max_over_ranks(len(groups), batches[0].input_ids.device)
    scored: list[PairLogps] = []
    for index in range(passes):
        group = groups[min(index, len(groups) - 1)]
        batch = merge(group)
        logps = ask(model, batch if index < len(groups) else filler(batch))
        if index < len(groups):
            scored += logps.split([batch.num_pairs for batch in group])
    return scored
