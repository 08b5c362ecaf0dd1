"""What the layers keep for the backward pass goes through the host, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.autograd.graph import saved_tensors_hooks

from dsdpo.config.model import ModelConfig
from dsdpo.objective.logps import ResponseScorer
from tests.runs import settings, train_on
from tests.tiny import random_batch, tiny_lm


def kept_by_layers(activations_on_host: bool) -> tuple[int, list[torch.Tensor]]:
    """Hidden states that stay where they were computed, and the gradients."""
    lm = tiny_lm("llama").train()
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    scorer, batch = ResponseScorer(lm, activations_on_host=activations_on_host), random_batch(3)
    shape = (*batch.input_ids.shape, lm.config.hidden_size)
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.shape == shape
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        summed = scorer(batch)
    summed.sum().backward()
    return kept, [parameter.grad for parameter in scorer.parameters() if parameter.grad is not None]


def test_no_hidden_state_stays_and_gradients_are_identical() -> None:
    kept, expected = kept_by_layers(False)
    assert kept >= 2, "the inputs of the two blocks, at least"
    none, found = kept_by_layers(True)
    assert none == 0
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_same_run_under_zero3(inputs: Path, tmp_path: Path) -> None:
    def rows(name: str, **model: Any) -> list[list[float]]:
        run = settings(tmp_path / name, inputs, model={"gradient_checkpointing": True, **model})
        return [[row["loss"], row["grad_norm"], row["comm/gathers"]] for row in train_on(2, run)]

    assert rows("offloaded", activation_offloading=True) == rows("kept")


def test_refused_without_checkpointing() -> None:
    with pytest.raises(ValidationError, match=r"activation_offloading true without model\.gradient_checkpointing"):
        ModelConfig(path="model", gradient_checkpointing=False, activation_offloading=True)
