"""What is refused of an adapter to go on with, before any model loads."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.engine.adapter_folder import check_adapter
from dsdpo.errors import ConfigError

NEEDED = {"data": {"train": "d"}, "deepspeed": "ds.json", "output_dir": "out"}
GOOD = {"peft_type": "LORA", "target_modules": ["q_proj"], "bias": "none", "base_model_name_or_path": "org/model"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_model.safetensors").touch()
    write(path)
    return path


def write(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(GOOD | changes))


def check_of(settings: dict[str, Any]) -> None:
    run = RunConfig.model_validate(settings)
    check_adapter(run, trains_biases=not plan_reference(run).shares_policy)


def check(folder: Path, **reference: Any) -> None:
    model = {"path": "org/model", "lora": {"path": str(folder)}}
    check_of(NEEDED | {"model": model, "reference": reference})


def test_a_lora_adapter_is_fine(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(folder)
        write(folder, base_model_name_or_path="/elsewhere/model")
        check(folder)
    assert not caplog.records


def test_nothing_to_check_for_a_fresh_one() -> None:
    check_of(NEEDED | {"model": {"path": "m", "lora": {}}})
    check_of(NEEDED | {"model": {"path": "m"}})


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"model\.lora\.path: no {name} in .*adapter; give an adapter folder"):
        check(folder)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        check(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "holds a PREFIX_TUNING adapter; dsdpo trains LoRA adapters"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has a LoRA on the output head"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "has a LoRA on the output head"),
        ({"bias": "all"}, "trains biases of the base model .* set reference.strategy to separate"),
    ],
)
def test_adapters_that_cannot_go_on(changes: dict[str, Any], message: str, folder: Path) -> None:
    write(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        check(folder)


def test_biases_are_fine_beside_a_second_model(folder: Path) -> None:
    write(folder, bias="all")
    check(folder, strategy="separate")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_settings(content: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        check(folder)


def test_another_base_model_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, base_model_name_or_path="org/other")
    with caplog.at_level(logging.WARNING):
        check(folder)
    assert "was trained on org/other and now goes on org/model" in caplog.text
