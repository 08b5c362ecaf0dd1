"""`dsdpo convert`: settings of other programs as runs of ours, and what has no counterpart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.__main__ import main
from dsdpo.config.convert import convert

FOREIGN = Path(__file__).parent / "foreign"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
EXPECTED: dict[str, dict[str, Any]] = {
    "trl.yaml": {
        "model": {"path": "org/base-sft", "revision": "main", "dtype": "bfloat16", "gradient_checkpointing": True,
                  "attn_implementation": "flash_attention_2", "use_liger_kernel": True},
        "data": {"train": [{"path": "org/feedback", "name": "default", "split": "train_prefs", "weight": 0.5},
                           {"path": "org/more", "split": "train"}],
                 "dataset_num_proc": 8, "max_length": 24576, "max_prompt_length": 1024},
        "loss": {"type": ["apo_zero", "sft"], "weights": [1.0, 0.2], "beta": 0.05},
        "reference": {"strategy": "precomputed"},
        "optimizer": {"learning_rate": 5e-7, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
        "batch": {"pairs_per_step": 4 * 4 * 2},
        "train": {"num_train_epochs": 1, "seed": 7},
        "evaluation": {"every_steps": 200},
        "checkpoint": {"every_steps": 100, "keep_last": 1},
        "export": {"push_to_hub": "me/model"},
        "tracking": {"wandb": {"name": "mine"}, "every_steps": 5},
        "deepspeed": "ds_configs/zero3.json",
        "output_dir": "out/apo",
    },
    "axolotl.yaml": {
        "model": {"path": "org/model-8b", "dtype": "bfloat16", "gradient_checkpointing": True, "pad_token": "<|pad|>",
                  "attn_implementation": "flash_attention_2",
                  "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}},
        "data": {"train": {"path": "org/pairs", "split": "train[:95%]"},
                 "eval": {"path": "org/pairs", "split": "train[95%:]"}, "text": "chat", "max_length": 4096},
        "loss": {"type": "sigmoid", "beta": 0.2},
        "optimizer": {"type": "adamw_8bit", "learning_rate": 0.0002, "lr_scheduler_type": "cosine",
                      "warmup_ratio": 0.1},
        "batch": {"pairs_per_step": 2 * 4 * 2},
        "train": {"num_train_epochs": 4},
        "tracking": {"wandb": {"project": "mine", "name": "first"}},
        "deepspeed": "ds_configs/zero3.json",
        "output_dir": "./outputs/dpo",
    },
    "llamafactory.yaml": {
        "model": {"path": "org/model-8b", "dtype": "bfloat16", "trust_remote_code": True, "lora": LORA},
        "data": {"train": {"path": str(FOREIGN / "data/pairs.json"), "columns": {"prompt": "instruction"},
                           "split": "train[:1000]"},
                 "text": "chat", "max_length": 2048, "dataset_num_proc": 16},
        "loss": {"type": "sigmoid", "beta": 0.1, "rpo_alpha": 0.3},
        "optimizer": {"learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
        "batch": {"pairs_per_step": 8 * 2},
        "train": {"num_train_epochs": 3.0},
        "checkpoint": {"every_steps": 500},
        "tracking": {"every_steps": 10},
        "deepspeed": "ds_configs/zero3.json",
        "output_dir": "saves/dpo",
        "overwrite_output_dir": True,
    },
    "openrlhf.sh": {
        "model": {"path": "org/model-8b", "dtype": "bfloat16", "gradient_checkpointing": True},
        "data": {"train": {"path": "org/mixture", "columns": {"chosen": "better", "rejected": "worse"}},
                 "max_length": 8192},
        "loss": {"beta": 0.1, "rpo_alpha": 0.2},
        "reference": {"path": "org/reference-8b", "deepspeed": "ds_configs/reference/zero3_offload.json"},
        "optimizer": {"learning_rate": 5e-7, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.95,
                      "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                      "warmup_ratio": 0.03},
        "batch": {"pairs_per_step": 256},
        "train": {"num_train_epochs": 1},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "tracking": {"wandb": {}, "every_steps": 1},
        "deepspeed": "ds_configs/zero3_offload.json",
        "output_dir": "./checkpoint/dpo",
    },
}  # fmt: skip
WITHOUT: dict[str, set[str]] = {
    "trl.yaml": set(),
    "axolotl.yaml": {"chat_template", "val_set_size", "evals_per_epoch", "saves_per_epoch"},
    "llamafactory.yaml": {"chat_template", "ddp_timeout"},
    "openrlhf.sh": set(),
}
IDLE: dict[str, list[str]] = {
    "trl.yaml": ["gradient_checkpointing_kwargs", "tf32"],
    "axolotl.yaml": [],
    "llamafactory.yaml": ["do_train", "overwrite_cache", "plot_loss"],
    "openrlhf.sh": [],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_programs_settings_become_a_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.yaml"
    program = name.split(".")[0]
    assert main(["convert", "--from", program, str(FOREIGN / name), "--out", str(out), "--gpus", "2", "--json"]) == 0
    assert yaml.safe_load(out.read_text()) == EXPECTED[name]
    said = json.loads(capsys.readouterr().out)
    left = said["left"]
    assert said["of_no_consequence"] == IDLE[name]
    assert {each["theirs"].split(":")[0] for each in left} == WITHOUT[name]
    assert all(each["why"] for each in left)
    assert all(f"#   {each['theirs']}" in out.read_text() for each in left)
    assert "&id" not in out.read_text(), "two settings share a value, which YAML writes as an anchor"
    assert next(iter(yaml.safe_load(out.read_text())["model"])) == "path"


def test_what_a_file_leaves_out_is_the_programs_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("model_name_or_path: m\ndataset_name: d\nuse_peft: true\n")
    found = convert(file, "trl", gpus=4)
    assert found.run["optimizer"]["learning_rate"] == 1e-6
    assert found.run["data"] == {"train": "d", "max_length": 1024}
    assert found.run["batch"]["pairs_per_step"] == 32
    assert found.run["model"]["lora"] == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    file.write_text("base_model: m\ndatasets: [{path: d}]\nrl: ipo\n")
    out = ["--out", str(tmp_path / "run.yaml")]
    assert main(["convert", "--from", "axolotl", str(file), *out, "--data.max_length", "512"]) == 0
    run = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (run["data"]["max_length"], run["loss"]) == (512, {"type": "ipo"})
    assert "dsdpo's own default: loss.beta, optimizer.learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "theirs", "train", "held_out", "left"),
    [
        ("axolotl", "datasets: [{path: d}]\nval_set_size: 0.02", "train[:98%]", "train[98%:]", {"val_set_size"}),
        ("axolotl", "datasets: [{path: d}]\nval_set_size: 500", "train[:-500]", "train[-500:]", {"val_set_size"}),
        ("axolotl", "datasets: [{path: d}]\nval_set_size: 0.0", None, None, set()),
        ("axolotl", "datasets: [{path: d, split: 'train[:9%]'}]\nval_set_size: 0.1", "train[:9%]", None,
         {"val_set_size"}),
        ("llamafactory", "dataset: d\nmax_samples: 1000\nval_size: 0.1", "train[:900]", "train[900:1000]",
         {"dataset", "val_size"}),
        ("llamafactory", "dataset: d\nmax_samples: 1000\nval_size: 10", "train[:990]", "train[990:1000]",
         {"dataset", "val_size"}),
        ("llamafactory", "dataset: d\neval_dataset: e\nmax_samples: 10", "train[:10]", None, {"dataset"}),
        ("openrlhf", "dataset: d\nmax_samples: 10", "train[:10]", None, set()),
        ("trl", "dataset_mixture: {datasets: [{path: d, split: all}, {path: e}], test_split_size: 0.1}", "all[:90%]",
         "all[90%:]", {"dataset_mixture.test_split_size"}),
        ("trl", "dataset_mixture: {datasets: [{path: d, split: all}, {path: e}], test_split_size: 50}", "all", None,
         {"dataset_mixture.test_split_size"}),
    ],
)  # fmt: skip
def test_parts_of_the_rows(
    program: Any, theirs: str, train: str | None, held_out: str | None, left: set[str], tmp_path: Path
) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(f"base_model: m\nmodel_name_or_path: m\npretrain: m\n{theirs}\n")
    found = convert(file, program, gpus=1)
    for name, split in (("train", train), ("eval", held_out)):
        sources = found.run["data"].get(name)
        first = sources[0] if isinstance(sources, list) else sources
        assert (first.get("split") if isinstance(first, dict) else None) == split, name
    assert {each.split(":")[0] for each, _ in found.left} == left


@pytest.mark.parametrize(
    ("program", "theirs", "kind", "options", "left"),
    [
        ("trl", "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 3}",
         "cosine_with_restarts", {"num_cycles": 3}, set()),
        ("trl", "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: '{\"min_lr\": 1.0e-7}'",
         "cosine_with_min_lr", {"min_lr": 1e-7}, set()),
        ("trl", "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {min_lr_rate: 0.1}", "cosine", None,
         {"lr_scheduler_kwargs"}),
        ("trl", "lr_scheduler_type: warmup_stable_decay", None, None, {"lr_scheduler_type"}),
        ("trl", "lr_scheduler_type: constant\nwarmup_ratio: 0.1", "constant", None, set()),
        ("axolotl", "lr_scheduler: cosine\ncosine_min_lr_ratio: 0.2", "cosine_with_min_lr", {"min_lr_rate": 0.2},
         set()),
        ("axolotl", "lr_scheduler: rex", None, None, {"lr_scheduler_type"}),
        ("openrlhf", "lr: 1.0e-6", "cosine_with_min_lr", {"min_lr_rate": 0.1}, set()),
        ("openrlhf", "lr_scheduler: constant", "constant", None, set()),
    ],
)  # fmt: skip
def test_schedules(
    program: Any, theirs: str, kind: str | None, options: dict[str, Any] | None, left: set[str], tmp_path: Path
) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(f"base_model: m\nmodel_name_or_path: m\npretrain: m\n{theirs}\n")
    found = convert(file, program, gpus=1)
    ours = found.run.get("optimizer", {})
    assert (ours.get("lr_scheduler_type"), ours.get("lr_scheduler_kwargs")) == (kind, options)
    assert {each.split(":")[0] for each, _ in found.left} == left
    assert not (kind == "constant" and "warmup_ratio" in ours)
    if "lr: " in theirs:
        assert ours["learning_rate"] == 1e-6, "the program's default took the place of another name for it"


@pytest.mark.parametrize(
    ("theirs", "ours", "left"),
    [
        ("adamw_torch_fused", {}, set()),
        ("paged_adamw_32bit", {}, set()),
        ("paged_adamw_8bit", {"type": "adamw_8bit"}, set()),
        ("lion_32bit", {"type": "lion", "adam_beta2": 0.999}, set()),
        ("lion_8bit", {"type": "lion", "adam_beta2": 0.999}, {"optim"}),
        ("sgd", {"type": "sgd"}, set()),
        ("muon", {"type": "muon"}, set()),
        ("adafactor", {}, {"optim"}),
        ("galore_adamw", {}, {"optim"}),
    ],
)
def test_optimizers(theirs: str, ours: dict[str, Any], left: set[str], tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(f"base_model: m\ndatasets: [{{path: d}}]\nrl: dpo\noptimizer: {theirs}\n")
    found = convert(file, "axolotl", gpus=1)
    assert found.run.get("optimizer", {}) == ours
    assert {each.split(":")[0] for each, _ in found.left} == left


def test_a_token_on_a_command_line_is_not_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "train.sh", tmp_path / "run.yaml"
    file.write_text("train --pretrain m --dataset d --use_wandb 0123secret --train_batch_size 8")
    assert main(["convert", "--from", "openrlhf", str(file), "--out", str(out)]) == 0
    assert "0123secret" not in out.read_text() + capsys.readouterr().out


WRONG = {
    "no such file": ("trl", None, []),
    "holds nothing": ("trl", "", []),
    "not valid YAML": ("axolotl", "a: [", []),
    "model is missing": ("trl", "beta: 0.1", []),
    "per_device_train_batch_size is 'auto'": ("trl", "per_device_train_batch_size: auto", []),
    "loss.beta is 'high'": ("trl", "model_name_or_path: m\ndataset_name: d\nbeta: high", []),
    "--gpus is 0": ("trl", "model_name_or_path: m\ndataset_name: d", ["--gpus", "0"]),
    "--loss.betta is not an option": ("trl", "model_name_or_path: m\ndataset_name: d", ["--loss.betta", "1"]),
    "--loss.beta needs a value": ("trl", "model_name_or_path: m\ndataset_name: d", ["--loss.beta"]),
    "invalid choice: 'verl'": ("verl", "model_name_or_path: m", []),
}


@pytest.mark.parametrize("expected", WRONG)
def test_what_cannot_be_converted_is_one_message(
    expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, text, options = WRONG[expected]
    file, out = tmp_path / "theirs.yaml", tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["convert", "--from", program, str(file), "--out", str(out), *options]) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()


def test_a_script_that_is_no_script_and_a_file_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "train.sh", tmp_path / "run.yaml"
    broken.write_text("train --pretrain 'm")
    assert main(["convert", "--from", "openrlhf", str(broken), "--out", str(out)]) == 2
    out.write_text("mine")
    assert main(["convert", "--from", "trl", str(FOREIGN / "trl.yaml"), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"
