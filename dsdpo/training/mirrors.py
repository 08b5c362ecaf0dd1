"""Where metrics go beside metrics.jsonl: the one interface of W&B and TensorBoard, and what they call things."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError

STEP = "step"  # what rows are drawn over
TRL_STEP = "train/global_step"
TRL_EPOCH = "train/epoch"


class Mirror(ABC):
    """A place that a run's metrics are sent to as well. Any method may raise: the run then goes on without it."""

    title: str
    """What it is called on the screen."""

    @abstractmethod
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row of metrics, under the names that it is to have here."""

    @abstractmethod
    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows of text, such as samples."""

    def alert(self, title: str, text: str, *, fatal: bool) -> None:  # noqa: B027
        """Tell whoever watches the run, where that is possible."""

    @abstractmethod
    def close(self, *, failed: bool) -> str | None:
        """Finish; what to say of it, if anything."""


def renamed(run: RunConfig, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics under the names of `tracking.names`, with the step among them.

    trl: as TRL's reports have them, so that runs of both draw over each other: `train/` before what is not of an
    evaluation, `eval/` staying, and `train/global_step` for the step.
    """
    if run.tracking.names == "dsdpo":
        return {**metrics, STEP: step}
    named = {
        name if name.startswith(("train/", "eval/")) else f"train/{name}": value for name, value in metrics.items()
    }
    return {**named, TRL_STEP: step}


def step_name(run: RunConfig) -> str:
    """The name of the step among the metrics."""
    return STEP if run.tracking.names == "dsdpo" else TRL_STEP


def check_mirrors(run: RunConfig) -> None:
    """Raise `ConfigError` where a run asks for a place whose package is not installed."""
    if run.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard true needs the package tensorboard, which is not installed: pip install "
            "'dsdpo[tensorboard]', or leave it out (metrics.jsonl is always written)"
        )
