"""The reference's settings: flat as a user writes them, and inside only combinations that mean something."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from dsdpo.config.loss import LOSSES
from dsdpo.config.reference import (
    STRATEGIES,
    Adapter,
    NoReference,
    Precomputed,
    ReferenceConfig,
    Separate,
    Snapshot,
    Sync,
)
from dsdpo.config.reference_plan import ReferencePlan, plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.objective.losses.registered import REGISTERED

MOVES = {"sync_ref_model": True}
COPIES = {**MOVES, "ref_model_mixup_alpha": 1.0}


def plan(lora: dict[str, Any] | None = None, loss: str | dict[str, Any] = "sigmoid", **reference: Any) -> ReferencePlan:
    """The reference of a run with these settings."""
    return plan_reference(
        RunConfig.model_validate(
            {
                "model": {"path": "policy", "lora": lora},
                "data": {"train": "rows.jsonl"},
                "loss": {"type": loss} if isinstance(loss, str) else loss,
                "reference": reference,
                "deepspeed": "ds.json",
                "output_dir": "out",
            }
        )
    )


@pytest.mark.parametrize(
    ("lora", "reference", "kind", "own_engine", "before_training", "sync"),
    [
        (None, {}, Separate, True, False, None),
        (None, {"strategy": "separate", **MOVES}, Separate, True, False, Sync(0.6, 512)),
        ({}, {}, Adapter, False, False, None),
        ({}, {**MOVES, "ref_model_sync_steps": 7}, Adapter, False, False, Sync(0.6, 7)),
        (None, {"strategy": "precomputed", "store": "s", "audit_rows": 0}, Precomputed, True, True, None),
        (None, {"strategy": "policy_snapshot", **COPIES}, Snapshot, False, False, Sync(1.0, 512)),
        (None, {"strategy": "none"}, NoReference, False, False, None),
    ],
)
def test_the_plan_says_what_the_reference_is(
    lora: dict[str, Any] | None,
    reference: dict[str, Any],
    kind: type,
    own_engine: bool,
    before_training: bool,
    sync: Sync | None,
) -> None:
    found = plan(lora, **reference)
    assert type(found.settings) is kind
    assert (found.own_engine, found.before_training, found.sync) == (own_engine, before_training, sync)
    assert found.exists is (kind is not NoReference)
    assert STRATEGIES[found.strategy].settings is kind


def test_a_reference_is_not_loaded_for_a_loss_without_one() -> None:
    assert plan(loss="simpo").strategy == "none"
    assert plan({}, loss="simpo").strategy == "none"
    assert plan(loss="simpo", path="other").strategy == "separate", "asked for, such as for its metrics"
    assert plan(loss="simpo", strategy="separate").strategy == "separate"
    with pytest.raises(ValidationError, match=r"strategy none leaves no reference .* loss\.type robust needs"):
        plan(loss="robust", strategy="none")


ASKED = {
    "separate": {},
    "adapter": {},
    "precomputed": {},
    "policy_snapshot": COPIES,
    "none": {},
}


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in REGISTERED])
def test_each_loss_takes_each_strategy_or_says_why_not(loss: str) -> None:
    """Frozen or moving, a loss that looks at a reference takes any; without one those go that can do without it."""
    assert ASKED.keys() == STRATEGIES.keys() - {"auto"}
    settings_of_it = {"type": loss, **({"label_smoothing": 0.1} if loss == "exo_pair" else {})}
    for strategy, settings in ASKED.items():
        lora = {} if strategy == "adapter" else None
        if strategy == "none" and LOSSES[loss].reference == "needed":
            with pytest.raises(ValidationError, match=rf"strategy none leaves no reference .* loss\.type {loss} needs"):
                plan(lora, settings_of_it, strategy=strategy)
        else:
            assert plan(lora, settings_of_it, strategy=strategy, **settings).strategy == strategy


def test_path_and_adapter_of_the_reference() -> None:
    assert plan().model.path == "policy"
    assert plan(path="other", revision="v2").model.path == "other"
    continued = plan({"path": "first"}, strategy="separate").model.lora
    assert continued is not None
    assert continued.path == "first"
    assert plan({"path": "first"}, strategy="separate", adapter="base").model.lora is None
    assert plan({"path": "first"}, path="other").model.lora is None


@pytest.mark.parametrize(
    ("given", "mentions"),
    [
        ({"strategy": "precomputed", **MOVES}, ["reference.sync_ref_model moves the reference", "once", "separate"]),
        ({"strategy": "none", **MOVES}, ["reference.sync_ref_model moves", "strategy none", "there is no reference"]),
        (
            {"strategy": "none", "score_tokens": 9},
            ["reference.score_tokens 9 has no effect", "reference.strategy none"],
        ),
        ({"strategy": "none", "path": "x"}, ["reference.path x", "separate or precomputed"]),
        ({"store": "x"}, ["reference.store x", "strategy auto", "set reference.strategy to precomputed"]),
        ({"strategy": "adapter", "deepspeed": "x"}, ["reference.deepspeed x", "the policy's own"]),
        ({"strategy": "policy_snapshot", **COPIES, "path": "x"}, ["reference.path x", "the policy itself"]),
        ({"strategy": "policy_snapshot"}, ["sync_ref_model to true (now false)", "mixup_alpha to 1 (now 0.6)"]),
        ({"strategy": "policy_snapshot", **MOVES}, ["sync_ref_model to true (now true)", "mixup_alpha to 1 (now 0.6)"]),
        ({"ref_model_sync_steps": 4}, ["reference.ref_model_sync_steps 4 has no effect", "sync_ref_model is false"]),
        ({"strategy": "separat"}, ["'separate'", "'none'"]),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, Any], mentions: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        ReferenceConfig(**given)
    for text in mentions:
        assert text in str(refused.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_settings_that_a_user_can_write(strategy: str) -> None:
    settings = STRATEGIES[strategy].settings
    assert settings.takes() <= set(ReferenceConfig.model_fields)
    assert {field.name for field in fields(settings)} - {"sync"} <= settings.takes()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_names_a_class_that_exists(strategy: str) -> None:
    from dsdpo.reference.base import Reference
    from dsdpo.run.models import reference_class

    assert issubclass(reference_class(strategy), Reference)


def test_a_divergence_from_no_reference_is_refused() -> None:
    run = {"model": {"path": "m"}, "data": {"train": "t"}, "deepspeed": "d", "output_dir": "o"}
    reference = {"strategy": "none"}
    RunConfig.model_validate({**run, "loss": {"type": "sigmoid"}, "reference": reference})
    loss = {"type": "sigmoid", "f_divergence_type": "forward_kl"}
    with pytest.raises(ValidationError, match=r"loss.f_divergence_type forward_kl is a divergence from the reference"):
        RunConfig.model_validate({**run, "loss": loss, "reference": reference})
