"""What a plan decides before anything is built: one layout for both models, and nothing written or deleted by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, LlamaConfig

from dsdpo.config.run import RunConfig
from dsdpo.engine.blank import attention_name
from dsdpo.errors import ConfigError
from dsdpo.run.inputs import check_inputs_stay
from dsdpo.run.plan import check_store, choose_layout


def run_in(folder: Path, **sections: Any) -> RunConfig:
    content = {"model": {"path": "m"}, "data": {"train": "d"}, "deepspeed": "ds.json", "output_dir": str(folder)}
    return RunConfig.model_validate({**content, **sections})


def test_the_attention_that_is_asked_for_stays_beside_a_reference_that_cannot_be_packed() -> None:
    run = run_in(Path("run"), model={"path": "m", "attn_implementation": "flash_attention_2"})
    models = {"model.path": LlamaConfig(), "reference.path": BloomConfig()}
    layout = choose_layout(run, models)
    assert layout.name == "padded"
    assert "bloom" in str(layout.why_padded)
    assert attention_name(run.model, layout.name) == "flash_attention_2"
    alone = choose_layout(run, {"model.path": LlamaConfig()})
    assert alone.name == "packed"
    assert attention_name(run.model, alone.name) == "dsdpo"


def test_a_store_is_checked_without_being_made(tmp_path: Path) -> None:
    check_store(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"reference.store: .*cannot be written"):
        check_store(tmp_path / "file" / "store")


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("model.path", {"model": {"path": "{out}/model"}}),
        ("model.path", {"model": {"path": "{link}"}}),
        ("model.tokenizer", {"model": {"path": "m", "tokenizer": "{out}/model"}}),
        ("model.lora.path", {"model": {"path": "m", "lora": {"path": "{out}/model"}}}),
        ("reference.path", {"reference": {"path": "{out}/merged"}}),
        ("data.train[0].path", {"data": {"train": "{out}/samples.jsonl"}}),
        ("data.eval[0].path", {"data": {"train": "d", "eval": "{out}/samples.jsonl"}}),
        ("data.cache_dir", {"data": {"train": "d", "cache_dir": "{out}/profile/cache"}}),
        ("deepspeed", {"deepspeed": "{out}/deepspeed.json"}),
        ("the run file", {}),
    ],
)
def test_what_a_run_reads_is_not_deleted(key: str, sections: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("model", "merged", "profile/cache"):
        (out / name).mkdir(parents=True)
    for name in ("samples.jsonl", "deepspeed.json", "config.yaml"):
        (out / name).write_text("")
    (tmp_path / "link").symlink_to(out / "model")
    filled = {name: filled_in(value, out=str(out), link=str(tmp_path / "link")) for name, value in sections.items()}
    run_file = out / "config.yaml" if key == "the run file" else tmp_path / "run.yaml"
    with pytest.raises(
        ConfigError, match=rf"{key.replace('[', chr(92) + '[')}: .* lies in .*choose another output_dir"
    ):
        check_inputs_stay(run_in(out, **filled, overwrite_output_dir=True), run_file)
    if "model" in filled and "lora" not in filled["model"]:
        with pytest.raises(ConfigError, match="the export at the end would replace"):
            check_inputs_stay(run_in(out, **filled, checkpoint={"resume": "auto"}), run_file)
    check_inputs_stay(run_in(tmp_path / "elsewhere", **filled, overwrite_output_dir=True), run_file)


def filled_in(value: Any, **places: str) -> Any:
    if isinstance(value, dict):
        return {name: filled_in(inner, **places) for name, inner in value.items()}
    return value.format(**places)
