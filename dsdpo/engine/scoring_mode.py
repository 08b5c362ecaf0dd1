"""An engine in evaluation mode for a while, whatever mode it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsdpo.engine.types import InferenceEngine


@contextmanager
def scoring(engine: InferenceEngine) -> Iterator[None]:
    """A block in which the engine's model is in evaluation mode and nothing records gradients."""
    was_training = engine.module.training
    # Dropout is off in any case; this is for what else a model does in training mode only.
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train(was_training)
