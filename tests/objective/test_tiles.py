"""MLPs in tiles give the same log-probs and gradients, and keep none of their wide activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsdpo.data.batch import PreferenceBatch, collate_padded
from dsdpo.data.packed_layout import collate_packed
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import ResponseScorer
from dsdpo.objective.tiles import compute_in_tiles, mlps_of
from tests.tiny import random_pairs, tiny_lm

INNER = 48  # width of the tiny models' MLPs


def scored(family: str, batch: PreferenceBatch, tokens: int | None, layout: str) -> tuple[Tensor, Tensor, int]:
    """Log-probs, gradients, and the most elements of an MLP's inner width that the forward pass keeps in a tensor."""
    lm, kept = tiny_lm(family, n_inner=INNER, vocab_size=103), 0
    lm.set_attn_implementation("dsdpo" if layout == "packed" else "eager")
    if tokens is not None:
        for mlp in mlps_of(lm):
            compute_in_tiles(mlp, tokens)

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.shape[-1:] == (INNER,) and not isinstance(tensor, torch.nn.Parameter):
            kept = max(kept, tensor.numel())
        return tensor

    scorer = ResponseScorer(lm)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        sums = scorer(batch)
    (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
    return sums.detach(), torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None]), kept


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
def test_tiled_equals_whole(family: str, layout: str) -> None:
    pairs = random_pairs(4, seed=3)
    batch = collate_packed(pairs) if layout == "packed" else collate_padded(pairs, pad_token_id=0)
    logps, gradient, kept = scored(family, batch, None, layout)
    tiled, tiled_gradient, kept_of_tiles = scored(family, batch, 7, layout)
    torch.testing.assert_close(tiled, logps, rtol=1e-5, atol=1e-4)
    assert (tiled_gradient - gradient).norm() < 1e-5 * gradient.norm()
    assert kept >= batch.num_tokens * INNER
    assert kept_of_tiles == 0
    assert torch.equal(scored(family, batch, 10_000, layout)[0], logps), "a short row is not cut"


def test_mixtures_of_experts_have_no_tiles() -> None:
    dense_first: Any = tiny_lm("deepseek_v3")
    assert len(mlps_of(dense_first)) == 1
    with pytest.raises(ConfigError, match="mlp_tile_tokens: MixtralForCausalLM has no MLP"):
        mlps_of(tiny_lm("mixtral"))
