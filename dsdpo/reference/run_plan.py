"""What a strategy may know of a run when it is built: the part of `run.plan.Plan` that references read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dsdpo.config.reference_plan import ReferencePlan
from dsdpo.config.run import RunConfig
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.steps import BatchSource, StepBatches
from dsdpo.data.types import Tokenizer
from dsdpo.sequence_group import SequenceGroup


class RunPlan(Protocol):
    """A run that has passed every check and whose data is ready."""

    @property
    def run(self) -> RunConfig: ...

    @property
    def reference(self) -> ReferencePlan: ...

    @property
    def reference_config(self) -> dict[str, Any]:
        """The DeepSpeed config of a reference engine, complete."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def train(self) -> BatchSource: ...

    @property
    def evaluation(self) -> BatchSource | None: ...

    @property
    def policy_config(self) -> dict[str, Any]:
        """The DeepSpeed config of the policy engine, complete."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one response, of all the run's data."""

    @property
    def sequence(self) -> SequenceGroup:
        """The ranks that share this rank's rows."""

    @property
    def store_folder(self) -> Path:
        """Where precomputed log-probs are kept."""

    def training_windows(self, device: torch.device, step: int = 0) -> Iterable[StepBatches]:
        """This rank's batches of the steps after `step`."""

    def held_out_windows(self, device: torch.device) -> Iterable[Sequence[PreferenceBatch]]:
        """This rank's batches of one evaluation."""

    def evaluates_after(self, step: int) -> bool:
        """True if held-out pairs are scored after `step`; 0 is the start."""
