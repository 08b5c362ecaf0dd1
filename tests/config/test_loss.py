"""The loss section: what is refused, in which words, and what it says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dsdpo.config.loss import LOSSES, BetaSchedule, LossConfig, takes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "hinge", "label_smoothing": 0.1}, ["loss.label_smoothing 0.1 has no effect", "hinge", "'robust'"]),
        ({"type": "sft", "beta": 0.5}, ["loss.beta 0.5 has no effect", "loss.type sft"]),
        ({"simpo_gamma": 1.0}, ["loss.simpo_gamma 1", "'alpha_dpo' or 'simpo'"]),
        ({"type": "sft", "rpo_alpha": 1.0}, ["loss.rpo_alpha 1", "set loss.rpo_alpha to null"]),
        ({"type": "aot", "use_weighting": True}, ["loss.use_weighting true", "to false"]),
        ({"type": "apo_zero", "f_divergence_type": "js_divergence"}, ["f_divergence_type", "apo_zero", "'sigmoid'"]),
        ({"type": ["sigmoid", "bco_pair"], "f_divergence_type": "js_divergence"}, ["not defined", "bco_pair"]),
        ({"f_alpha_divergence_coef": 0.3}, ["f_alpha_divergence_coef 0.3", "alpha_divergence"]),
        ({"type": "exo_pair"}, ["label_smoothing 0", "exo_pair", "0.001"]),
        ({"type": []}, ["loss.type []"]),
        ({"type": ["kto", "sft"]}, ["kto is a loss of single rated completions", "sft is a loss of pairs"]),
        ({"type": "kto", "rpo_alpha": 1.0}, ["loss.rpo_alpha 1 has no effect", "loss.type kto"]),
        ({"desirable_weight": 2.0}, ["loss.desirable_weight 2", "'kto' or 'apo_zero_unpaired'"]),
        ({"type": ["sigmoid", "sigmoid"]}, ["sigmoid more than once"]),
        ({"type": ["sigmoid", "sft"], "weights": [1.0]}, ["loss.weights [1.0] has 1 values for 2 losses"]),
        ({"type": ["sigmoid", "sft"], "weights": [0.0, 0.0]}, ["all 0"]),
        ({"weights": [1.0, 2.0]}, ["2 values for 1 losses (sigmoid)"]),
        ({"beta_dpo_alpha": 0.6, "beta": {"start": 0.1, "end": 0.5}}, ["beta_dpo_alpha", "loss.beta_schedule"]),
        ({"beta": {"start": 0.1, "end": 0.5, "schedule": "square"}}, ["'linear' or 'cosine'"]),
        ({"beta": {"start": 0.1}}, ["beta_schedule.end"]),
        ({"beta": {"begin": 0.1}}, ["valid number"]),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(settings: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        LossConfig.model_validate(settings)
    for text in expected:
        assert text in str(refused.value)


def test_a_section_written_out_and_read_again_is_the_same() -> None:
    for settings in (
        {},
        {"type": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]},
        {"beta": {"start": 0.1, "end": 0.5, "schedule": "cosine"}},
        {"type": "exo_pair", "label_smoothing": 0.01, "f_divergence_type": "js_divergence", "ld_alpha": 0.5},
    ):
        loss = LossConfig.model_validate(settings)
        assert LossConfig.model_validate(yaml.safe_load(yaml.safe_dump(loss.model_dump(mode="json")))) == loss


def test_a_loss_says_what_it_is() -> None:
    mix = LossConfig(type=["sigmoid", "sft"], weights=[0.5, 1.0], label_smoothing=0.1)
    assert mix.describe() == "0.5 sigmoid + sft, beta 0.1, label_smoothing 0.1"
    assert LossConfig(beta_schedule=BetaSchedule(end=1)).describe() == "sigmoid, beta 0.1 to 1 (linear)"


def test_what_a_mix_needs_is_what_any_part_needs() -> None:
    assert LossConfig(type=["simpo", "sft"]).reference_use == "unused"
    assert LossConfig(type=["simpo", "sigmoid"]).reference_use == "optional"
    assert LossConfig(type=["sigmoid", "apo_zero"]).reference_use == "needed"
    assert LossConfig(type="odpo").columns == ("margin",)
    assert LossConfig(ld_alpha=0.3, decay=0.98).token_weights == "ld_alpha 0.3, decay 0.98"


def test_every_field_belongs_to_a_loss() -> None:
    for name in set(LossConfig.model_fields) - {"type", "weights", "options"}:
        assert any(takes(loss, name) for loss in LOSSES), name
