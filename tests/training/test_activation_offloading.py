"""What the layers keep for the backward pass goes through the host, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.autograd.graph import saved_tensors_hooks

from dsdpo.config.model import ModelConfig
from dsdpo.objective import offload
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


def test_each_tensor_comes_back_once_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reverse of the order in which they went, the next one with the present one."""
    events: list[tuple[str, int]] = []
    to_host, to_device, take = offload._Copies.to_host, offload._Copies.to_device, offload._Kept.take

    def gone(copies: Any, tensor: torch.Tensor) -> torch.Tensor:
        events.append(("gone", len(tensor)))
        return to_host(copies, tensor)

    def back(copies: Any, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        events.append(("back", len(host)))
        return to_device(copies, host, device)

    def taken(kept: Any) -> torch.Tensor:
        found = take(kept)
        events.append(("taken", len(found)))
        return found

    for owner, name, function in ((offload._Copies, "to_host", gone), (offload._Copies, "to_device", back)):
        monkeypatch.setattr(owner, name, function)
    monkeypatch.setattr(offload._Kept, "take", taken)
    value = torch.ones(3, requires_grad=True)
    with offload.kept_on_host(torch.device("cpu")):
        first = value.exp()  # keeps its result, 3 numbers
        second = torch.cat([first, first]).exp()  # 6
        third = torch.cat([second, second]).exp()  # 12
    third.sum().backward()
    assert [size for what, size in events if what == "gone"] == [3, 6, 12]
    assert events[3:] == [
        ("back", 12), ("back", 6), ("taken", 12), ("back", 3), ("taken", 6), ("taken", 3)
    ]  # fmt: skip


def test_same_run_under_zero3(inputs: Path, tmp_path: Path) -> None:
    def rows(name: str, **model: Any) -> list[list[float]]:
        run = settings(tmp_path / name, inputs, model={"gradient_checkpointing": True, **model})
        return [[row["loss"], row["grad_norm"], row["comm/gathers"]] for row in train_on(2, run)]

    assert rows("offloaded", activation_offloading=True) == rows("kept")


def test_refused_without_checkpointing() -> None:
    with pytest.raises(ValidationError, match=r"activation_offloading true without model\.gradient_checkpointing"):
        ModelConfig(path="model", gradient_checkpointing=False, activation_offloading=True)
