"""Factors of position embeddings that depend on length: one choice for a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsdpo.engine.rope import fix_rope_factors, longest_allowed
from dsdpo.reference.identity import architecture_digest
from tests.engines import save_lm
from tests.runs import losses, settings, train_on
from tests.tiny import SMALL, tiny_lm

ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [6.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def phi3(**changes: Any) -> Any:
    options = {"original_max_position_embeddings": ORIGINAL, "rope_parameters": LONGROPE}
    return tiny_lm("phi3", **options, **changes)


@pytest.mark.parametrize(("longest", "choice"), [(ORIGINAL, "short"), (ORIGINAL + 1, "long")])
def test_longrope_is_the_same_for_short_and_long_passes(longest: int, choice: str) -> None:
    lm = phi3()
    ids = torch.arange(3, 3 + 2 * ORIGINAL)[None]
    transformers_own = lm(input_ids=ids[:, :longest]).logits
    fix_rope_factors(lm, longest)
    assert lm.rope_choice == choice
    fixed = lm(input_ids=ids[:, :longest]).logits
    torch.testing.assert_close(fixed, transformers_own, rtol=0, atol=0)
    for end in (8, 2 * ORIGINAL):
        torch.testing.assert_close(lm(input_ids=ids[:, :end]).logits[:, :8], fixed[:, :8], rtol=1e-4, atol=1e-4)


def test_dynamic_scaling_is_that_of_the_longest_pair() -> None:
    lm, ids = tiny_lm(rope_parameters=DYNAMIC, max_position_embeddings=32), torch.arange(3, 67)[None]
    whole = lm(input_ids=ids).logits
    fix_rope_factors(lm, 64)
    torch.testing.assert_close(lm(input_ids=ids[:, :10]).logits, whole[:, :10], rtol=1e-4, atol=1e-4)
    assert lm.rope_choice == "dynamic, 64 tokens"


def test_other_models_are_left_alone() -> None:
    lm = tiny_lm()
    fix_rope_factors(lm, 10_000)
    assert not hasattr(lm, "rope_choice")


def test_the_choice_is_part_of_the_identity() -> None:
    config = phi3().config
    digests = {architecture_digest(config, rope_choice=choice) for choice in (None, "short", "long")}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("rope", "positions", "limit"),
    [
        (None, 128, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 128, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
        (DYNAMIC, 128, 512),
    ],
)
def test_tokens_that_a_model_takes(rope: dict[str, Any] | None, positions: int, limit: int) -> None:
    changes = {} if rope is None else {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    assert longest_allowed(tiny_lm(**changes, max_position_embeddings=positions).config) == limit
    assert SMALL["max_position_embeddings"] == 128


def test_policy_and_reference_are_one_function_whatever_their_batches(inputs: Path, tmp_path: Path) -> None:
    """Losses of a run that changes nothing: the reference scores a whole step at once, the policy two pairs."""
    path = save_lm(tmp_path / "start", inputs / "model", phi3())
    run = settings(
        tmp_path,
        inputs,
        policy_zero="zero2",
        reference_zero="zero0",
        model={"path": path},
        optimizer={"learning_rate": 0.0},
        batch={"pairs_per_micro_batch": 1},
    )
    assert losses(train_on(1, run)) == pytest.approx([0.693147] * 4, abs=1e-5)
