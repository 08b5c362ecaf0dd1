"""Products in 8-bit floats: what a number is rounded to, how far off a model is, and the reference of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dsdpo.config.model import ModelConfig
from dsdpo.config.quantization import QuantizationConfig
from dsdpo.errors import ConfigError
from dsdpo.estimate.weights import blank_model
from dsdpo.objective.eight_bits import Fp8Linear, multiplied, multiply_in_fp8, rounded
from dsdpo.objective.logps import ResponseScorer
from tests.gpu.support import DEVICE, ON_CUDA, distance
from tests.runs import settings, train_on
from tests.tiny import random_batch, tiny_lm


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """By its definition: three bits after the leading one, none closer than 2^-9, the even one of two as near."""
    spacing = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 1e-30))), -6) - 3)
    return np.clip(np.round(values / spacing) * spacing, -448, 448)


def test_rows_are_rounded_by_the_formats_definition() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(7, 100) * torch.logspace(-4, 4, 7)[:, None]
    matrix[3] = 0.0
    found, scales = rounded(matrix)
    exact = matrix.abs().amax(1, keepdim=True).double() / 448
    assert distance(scales, exact) < 1e-6
    ours = (matrix / scales).double().numpy()
    assert np.array_equal(found.double().numpy(), to_e4m3(ours))
    assert found[[0, 1, 2, 4, 5, 6]].float().abs().amax(1).eq(448).all()


@pytest.mark.parametrize("bias", [True, False])
def test_layer_multiplies_what_was_rounded(bias: bool) -> None:
    """On a GPU that has such products, theirs; the layer's own result is within the format's rounding of the exact."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ON_CUDA else torch.float32
    linear: Any = nn.Linear(64, 48, bias=bias, device=DEVICE, dtype=dtype)
    hidden = torch.randn(3, 5, 64, device=DEVICE, dtype=dtype)
    exact = linear(hidden)
    linear.__class__ = Fp8Linear
    (rows, row_scales), (weight, weight_scales) = rounded(hidden.flatten(0, 1)), rounded(linear.weight)
    by_hand = (rows.double() * row_scales) @ (weight.double() * weight_scales).T
    assert distance(multiplied(rows, row_scales, weight, weight_scales), by_hand) < (2**-8 if ON_CUDA else 1e-6)
    assert 1e-3 < distance(linear(hidden), exact) < 0.05
    assert linear(hidden[:0]).shape == (0, 5, 48)


def test_layers_below_the_head_and_no_router() -> None:
    lm = tiny_lm("deepseek_v3")
    exact = ResponseScorer(tiny_lm("deepseek_v3", scale=1.0))(random_batch())
    multiply_in_fp8(lm)
    changed = {name for name, module in lm.named_modules() if isinstance(module, Fp8Linear)}
    assert "lm_head" not in changed
    assert not any(name.endswith(".gate") for name in changed)
    assert "model.layers.0.mlp.gate_proj" in changed
    coarse = tiny_lm("deepseek_v3", scale=1.0)
    multiply_in_fp8(coarse)
    assert 0 < distance(ResponseScorer(coarse)(random_batch()), exact) < 0.05
    with pytest.raises(ConfigError, match="has no linear layers below its head"):
        multiply_in_fp8(tiny_lm("gpt2"))


def test_forecasts_count_weights_as_they_are_held(inputs: Path) -> None:
    plain = ModelConfig(path=str(inputs / "model"))
    coarse = plain.model_copy(update={"quantization": QuantizationConfig(bits=8)})
    ours, held = (blank_model(model, layout="packed", trains=False).weights for model in (coarse, plain))
    assert ours == held


@pytest.mark.parametrize("strategy", ["separate", "precomputed"])
def test_reference_of_a_run(strategy: str, inputs: Path, tmp_path: Path) -> None:
    """Its weights are the policy's and its log-probs nearly are: the first loss is near ln 2 and not there."""
    run = settings(
        tmp_path, inputs, reference={"strategy": strategy, "quantization": {"bits": 8}}, train={"max_steps": 1}
    )
    (first,) = (row["loss"] for row in train_on(2, run) if "loss" in row)
    assert 1e-6 < abs(first - math.log(2)) < 0.05
