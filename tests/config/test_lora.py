"""Settings of an adapter: peft's names and values, contradictions, and which reference goes with them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dsdpo.config.load import dump_yaml, load_run, run_parser
from dsdpo.config.lora import LoraConfig
from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import RunConfig

NEEDED = {"data": {"train": "d"}, "deepspeed": "ds.json", "output_dir": "out"}


def make(lora: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(NEEDED | {"model": {"path": "m", "lora": lora}} | sections)


def test_names_and_defaults_are_pefts() -> None:
    """Every field is one of peft.LoraConfig's, with its default, but for target_modules, which has none there."""
    import peft

    theirs = {field.name for field in fields(peft.LoraConfig)}
    ours = LoraConfig().peft_fields()
    assert set(ours) <= theirs
    default = peft.LoraConfig()
    assert {name: value for name, value in ours.items() if value != getattr(default, name)} == {
        "target_modules": "all-linear"
    }


def test_fields_reach_peft_as_they_are() -> None:
    import peft

    given = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 8},
        "modules_to_save": ["lm_head"],
        "layers_to_transform": [0, 2],
        "init_lora_weights": "gaussian",
    }
    config = peft.LoraConfig(**LoraConfig(**given).peft_fields())
    found = {name: getattr(config, name) for name in given}
    assert found | {"target_modules": list(found["target_modules"])} == given


@pytest.mark.parametrize(
    ("lora", "mentions"),
    [
        ({"path": "a", "r": 8}, ["model.lora.path a", "model.lora.r 8"]),
        ({"path": "a", "use_dora": False, "lora_alpha": 2}, ["model.lora.path a", "model.lora.lora_alpha 2"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["target_modules", "output head", "modules_to_save: [lm_head]"]),
        ({"target_modules": "model.lm_head|lm_head"}, ["output head"]),
        ({"init_lora_weights": "pissa"}, ["'gaussian' or 'orthogonal'"]),
        ({"lora_dropout": 1.0}, ["less than 1"]),
        ({"r": 0}, ["greater than 0"]),
        ({"rank": 8}, ["Extra inputs"]),
    ],
)
def test_refused_settings(lora: dict[str, Any], mentions: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        make(lora)
    for text in mentions:
        assert text in str(refused.value)


@pytest.mark.parametrize(
    ("lora", "reference", "strategy", "second_adapter"),
    [
        (None, {}, "separate", False),
        ({}, {}, "adapter", False),
        ({"path": "a"}, {}, "adapter", True),
        ({"path": "a"}, {"adapter": "base"}, "adapter", False),
        ({}, {"sync_ref_model": True}, "adapter", True),
        ({}, {"strategy": "separate"}, "separate", False),
        ({"path": "a"}, {"strategy": "separate"}, "separate", False),
        ({}, {"path": "other"}, "separate", False),
        ({}, {"revision": "v2"}, "separate", False),
        ({}, {"deepspeed": "ref.json"}, "separate", False),
        ({"bias": "all"}, {}, "separate", False),
    ],
)
def test_reference_that_goes_with_it(
    lora: dict[str, Any] | None, reference: dict[str, Any], strategy: str, second_adapter: bool
) -> None:
    run = make(lora, reference=reference)
    plan = plan_reference(run)
    assert (plan.strategy, plan.second_adapter) == (strategy, second_adapter)


@pytest.mark.parametrize(
    ("lora", "sections", "mentions"),
    [
        (None, {"reference": {"strategy": "adapter"}}, ["reference.strategy adapter", "model.lora"]),
        (None, {"reference": {"adapter": "base"}}, ["reference.adapter base", "model.lora"]),
        (None, {"export": {"merge_adapter": True}}, ["export.merge_adapter true", "model.lora"]),
        ({}, {"reference": {"strategy": "adapter", "path": "o"}}, ["reference.path o", "reference.strategy adapter"]),
        (
            {"bias": "all"},
            {"reference": {"strategy": "adapter"}},
            ["model.lora.bias all", "reference.strategy to separate"],
        ),
        (
            {"path": "a"},
            {"reference": {"adapter": "base", "sync_ref_model": True}},
            ["reference.sync_ref_model", "reference.adapter base"],
        ),
    ],
)
def test_contradictions(lora: dict[str, Any] | None, sections: dict[str, Any], mentions: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        make(lora, **sections)
    for text in mentions:
        assert text in str(refused.value)


@pytest.mark.parametrize("lora", [None, {}, {"path": "a"}, {"r": 4, "rank_pattern": {"x": 2}, "target_modules": ["q"]}])
def test_written_out_and_read_again_it_is_the_same(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    run = make(lora)
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    again, _ = load_run([str(tmp_path / "run.yaml")], run_parser("dsdpo train", ""))
    assert again == run


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {train: d}\ndeepspeed: ds.json\noutput_dir: out\n")
    options = ["--model.lora.r", "16", "--model.lora.target_modules", "all-linear", "--export.merge_adapter", "true"]
    run, _ = load_run([str(tmp_path / "run.yaml"), *options], run_parser("dsdpo train", ""))
    assert run.model.lora is not None
    assert (run.model.lora.r, run.export.merge_adapter) == (16, True)
    assert re.search(r"^  lora:\n    path: null\n    r: 16$", dump_yaml(run), re.MULTILINE)
