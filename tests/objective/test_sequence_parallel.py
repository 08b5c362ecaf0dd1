"""A row split over ranks gives the log-probs and gradients of the whole row, whatever a family's attention has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.collate import merge
from dsdpo.data.packed_layout import collate_packed
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import ResponseScorer
from dsdpo.objective.sequence_parallel import refuse_heads
from dsdpo.objective.token_weights import TokenWeights
from dsdpo.sequence_group import sequence_group
from tests.objective.test_attention import FAMILIES, pairs_of_all_kinds
from tests.ranks import run_ranks
from tests.tiny import random_pairs, tiny_lm


def scored(scorer: ResponseScorer, batch: PreferenceBatch, extras: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Sums of all responses, and all gradients of a loss that weighs each otherwise, added up over the group."""
    scorer.zero_grad()
    sums = scorer(batch, extras=extras)
    (torch.sin(sums) * torch.linspace(-1, 1, sums.shape[-1])).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])
    if scorer.sequence is not None:
        dist.all_reduce(gradient, group=scorer.sequence.handle)
    return sums.detach(), gradient


def differences(size: int) -> dict[str, tuple[float, float]]:
    """For each family, log-probs and relative gradients of the split row less those of the whole one."""
    group = sequence_group(size)
    found = {}

    def compare(
        name: str, lm: Any, batch: PreferenceBatch, extras: tuple[str, ...] = (), weights: TokenWeights | None = None
    ) -> None:
        scorer = ResponseScorer(lm, sequence=group, token_weights=weights)
        split, gradient = scored(scorer, batch, extras)
        scorer.sequence = None
        whole, expected = scored(scorer, batch, extras)
        found[name] = float((split - whole).abs().max()), float((gradient - expected).norm() / expected.norm())

    def model(family: str, **changes: Any) -> Any:
        lm = tiny_lm(family, **changes)
        lm.set_attn_implementation("dsdpo")
        return lm

    batch = collate_packed(pairs_of_all_kinds())
    assert batch.num_tokens % size, "a row without padding tests less"
    for name, (family, changes) in FAMILIES.items():
        compare(name, model(family, **changes), batch)
    checkpointed = model("llama").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    compare("checkpointed", checkpointed, batch)
    merged = merge([collate_packed(random_pairs(2, seed=seed)) for seed in (1, 2)])
    compare("merged", model("qwen3"), merged, ("plain", "entropy"), TokenWeights(ld_alpha=0.5))
    # All scored positions at the row's end: most ranks have none.
    compare("nothing to score", model("llama"), collate_packed([long_prompt()]))
    return found


def long_prompt() -> Any:
    from dsdpo.data.pairs import Group

    tokens = np.random.default_rng(0).integers(3, 97, size=60)
    return Group.of(0, tokens[:55], tokens[55:57], tokens[57:])


@pytest.mark.parametrize("size", [2, 4])
def test_split_equals_whole(size: int) -> None:
    """With 4 ranks there are fewer key and value heads than ranks."""
    for found in run_ranks(size, differences, size):
        for name, (logps, gradient) in found.items():
            assert logps < 1e-4, name
            assert gradient < 1e-5, name


def test_heads_that_ranks_cannot_share() -> None:
    refuse_heads(28, 4, "qwen2")
    with pytest.raises(ConfigError, match=r"8 ranks cannot share the 28 .* heads of qwen2 .*can: 2, 4, 7, 14, 28"):
        refuse_heads(28, 8, "qwen2")
