"""What dsdpo uses of DeepSpeed's engines: a reader's way from the loop into DeepSpeed, and mypy's."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from dsdpo.objective.logps import ResponseScorer


class InferenceEngine(Protocol):
    """An engine that scores: `deepspeed.DeepSpeedEngine` around a `ResponseScorer`, with or without an optimizer."""

    module: ResponseScorer

    def __call__(self, **of_forward: Any) -> Any:
        """What `ResponseScorer.forward` gives: float32 log-probs, chosen responses first. Collective under ZeRO-3."""
        ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


class TrainingEngine(InferenceEngine, Protocol):
    """An engine that trains: gradients add up over `backward` calls until `step` reduces and applies them."""

    skipped_steps: int  # since the start of the run: not finite

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool = True) -> Any:
        """Add the gradient of `loss` (). Collective."""
        ...

    def step(self) -> Any:
        """Average gradients over ranks, clip, update, move on in the schedule. Collective."""
        ...

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights, the same on every rank."""
        ...

    def get_lr(self) -> list[float]:
        """The rate of the next step, by parameter group."""
        ...

    def get_global_grad_norm(self) -> Any:
        """Norm of the last step's gradient before clipping, None before the first."""
        ...
