"""`dsdpo train` as a user meets it: help, dry run, whole runs however they are started, and what they leave behind."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsdpo.__main__ import main
from dsdpo.config.load import dotted_keys, load_run, run_parser
from dsdpo.config.run import RunConfig
from tests.commands.processes import DSDPO, SLURM, finish, launcher, main_here, start_ranks
from tests.ranks import run_ranks
from tests.runs import losses, metrics, settings, train_on, write_json
from tests.warm import warm_dsdpo

LIMIT_S = 400
TRL_NAMES = {
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
}
CHATTER = re.compile(r"INFO|WARN|bf16_ ?optimizer|Virtual Memory|Max_MA|before init|after init|it/s|examples/s")


def run_file(folder: Path, run: dict[str, Any]) -> str:
    """The run as a YAML file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return str(path)


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    sections = {key for key in dotted_keys() if any(other.startswith(f"{key}.") for other in dotted_keys())}
    assert [key for key in dotted_keys() if key not in sections and f"--{key} " not in text] == []
    assert [name for name in RunConfig.model_fields if name in sections and f"{name} options:" not in text] == []
    assert "--dry-run" in text


def test_help_without_a_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "dsdpo train RUN.yaml" in capsys.readouterr().out


def test_dry_run_plans_and_touches_nothing(inputs: Path, tmp_path: Path) -> None:
    """The weights are whole but not a number: whoever loaded them would refuse them."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    held = load_file(model / "model.safetensors")
    save_file({name: torch.full_like(tensor, math.nan) for name, tensor in held.items()}, model / "model.safetensors")
    run = settings(
        tmp_path,
        inputs,
        policy_zero="zero3_offload",
        model={"path": str(model)},
        data={"eval": str(inputs / "test.jsonl")},
    )
    answers = run_ranks(2, dry_run_here, run_file(tmp_path, run))
    assert [code for code, _, _ in answers] == [0, 0]
    assert not Path(run["output_dir"]).exists()
    plan, others = answers[0][1], answers[1][1] + answers[1][2]
    assert others == ""
    for line in (
        f"policy  {model} (float32), ZeRO-3, parameters on cpu, optimizer on cpu",
        f"reference  {model}, separate: ZeRO-3",
        "train data  1,728 pairs, ",
        "held-out data  240 pairs, ",
        "steps  4 of 8 pairs, 2 ranks",
        "first step  8 pairs, ",
        "micro-batches a rank: 2",
        "speed  not forecast",  # the demo is too small
    ):
        assert line in plan, plan


def dry_run_here(path: str) -> tuple[int, str, str]:
    from dsdpo import __main__

    __main__.leave_process_group = lambda: None  # type: ignore[assignment]  # the pool of ranks lives on
    return main_here(["train", path, "--dry-run"])


class Finished(NamedTuple):
    run: dict[str, Any]
    answer: subprocess.CompletedProcess[str]

    @property
    def folder(self) -> Path:
        return Path(self.run["output_dir"])


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run on 2 ranks under the real launcher."""
    folder = tmp_path_factory.mktemp("launched")
    run = settings(
        folder,
        inputs,
        data={"eval": str(inputs / "few.jsonl")},
        evaluation={"every_steps": 2},
        checkpoint={"every_steps": 1, "keep_last": 2},
        tracking={"wandb": {"mode": "offline", "tags": ["test"]}},
    )
    return Finished(run, finish([*launcher(), "train", run_file(folder, run)], limit_s=LIMIT_S))


def test_launched_run_ends_well_and_quietly(finished: Finished) -> None:
    answer = finished.answer
    assert answer.returncode == 0
    assert "terminate called" not in answer.stderr
    assert "Traceback" not in answer.stderr
    assert_quiet(answer.stdout)
    assert len(re.findall(r"^ +policy ", answer.stdout, re.MULTILINE)) == 1, "every rank printed the plan"
    folder = finished.folder
    for words in (r"^trained  78,336 parameters$", r"^took     \d+ (s|min \d+ s)$", rf"^saved    {folder}/checkpoints$",
                  rf"^next     dsdpo report {folder}$"):  # fmt: skip
        assert re.search(words, answer.stdout, re.MULTILINE), words


def assert_quiet(text: str) -> None:
    """Nothing of DeepSpeed, transformers and the like, but for the launcher's own search for an accelerator."""
    lines = [line for line in text.splitlines() if "real_accelerator.py" not in line]
    assert [line for line in lines if CHATTER.search(line)] == []


def test_run_folder_says_what_was_run(finished: Finished) -> None:
    folder = finished.folder
    again, _ = load_run([str(folder / "config.yaml")], run_parser("dsdpo train", ""))
    assert again == RunConfig.model_validate(finished.run)
    policy = json.loads((folder / "deepspeed.json").read_text())
    reference = json.loads((folder / "deepspeed_reference.json").read_text())
    assert policy["zero_optimization"]["stage"] == reference["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps([policy, reference])
    assert "optimizer" not in reference
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_metrics_are_one_row_a_step_under_trl_names(finished: Finished) -> None:
    rows = metrics(finished.folder)
    assert all(next(iter(row)) == "step" for row in rows)
    train = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval/loss" in row]
    assert len(train) + len(held_out) == len(rows)
    assert [row["step"] for row in train] == [1, 2, 3, 4]
    assert [row["step"] for row in held_out] == [0, 2, 4]
    for row in train:
        assert {*TRL_NAMES, "grad_norm", "learning_rate", "epoch"} <= set(row)
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
    for row in held_out:
        assert {f"eval/{name}" for name in TRL_NAMES} <= set(row)
        assert [name for name in row if name != "step" and not name.startswith("eval/")] == []
    assert train[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert held_out[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)


def test_exported_model_is_an_ordinary_one(finished: Finished, inputs: Path) -> None:
    folder = finished.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert model.dtype == torch.float32
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, start.model.layers[0].mlp.up_proj.weight)
    text = "what colour is the sun ?"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(inputs / "model")(text)
    card = (folder / "README.md").read_text()
    assert "eval/rewards/accuracies" in card
    assert "learning_rate: 0.001" in card


def test_wandb_id_is_kept(finished: Finished) -> None:
    name = (finished.folder / "wandb_run_id").read_text().strip()
    assert len(list(finished.folder.glob(f"wandb/offline-run-*-{name}"))) == 1


@pytest.fixture(scope="module")
def pooled_losses(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of the same run on the ranks of tests/ranks.py."""
    return losses(train_on(2, settings(tmp_path_factory.mktemp("pooled"), inputs)))


def test_launched_run_equals_pooled_ranks(finished: Finished, pooled_losses: list[float]) -> None:
    assert pooled_losses == losses(metrics(finished.folder))


def test_overwriting_leaves_nothing_of_the_earlier_run(inputs: Path, tmp_path: Path) -> None:
    """(That a second run into the folder is refused stands in the table of bad input.)"""
    first = settings(tmp_path, inputs, checkpoint={"every_steps": 1})
    train_on(1, first)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    second = settings(tmp_path, inputs, train={"max_steps": 2}, overwrite_output_dir=True)
    rows = train_on(1, second)
    assert [row["step"] for row in rows] == [1, 2]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_one_process_without_launcher_in_bf16(inputs: Path, tmp_path: Path) -> None:
    """ZeRO-1 and a stage-0 reference in bf16, where DeepSpeed's BF16_Optimizer prints memory figures unasked."""
    run = settings(tmp_path, inputs, policy_zero="zero1", reference_zero="zero0", model={"dtype": "bfloat16"})
    command = [*warm_dsdpo(), "--local_rank=0", "train", run_file(tmp_path, run)]
    answer = finish(command, limit_s=LIMIT_S)
    assert answer.returncode == 0
    assert len(losses(metrics(Path(run["output_dir"])))) == 4
    assert_quiet(answer.stdout)
    lines = [line for line in re.split(r"[\r\n]+", answer.stderr) if line and not line.startswith("train ")]
    # On a busy machine it is said what takes long.
    assert [line for line in lines if not re.search(r" \.\.\. \d+ s$", line)] == []


def test_quiet_says_only_where_the_model_is(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, data={"eval": str(inputs / "few.jsonl")}, train={"max_steps": 1})
    answer = finish([*DSDPO, "train", run_file(tmp_path, run), "--quiet"], limit_s=LIMIT_S)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"{tmp_path / 'run' / 'model'}\n", "")


def test_verbose_brings_the_libraries_back(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, policy_zero="zero1", reference_zero="zero0", model={"dtype": "bfloat16"})
    answer = finish([*warm_dsdpo(), "train", run_file(tmp_path, run), "--verbose"], limit_s=LIMIT_S)
    assert answer.returncode == 0
    assert "[INFO]" in answer.stdout
    assert "begin bf16_optimizer" in answer.stderr


def test_slurm_starts_ranks_by_its_own_variables(inputs: Path, pooled_losses: list[float], tmp_path: Path) -> None:
    """Two processes with what srun sets and nothing else."""
    run = settings(tmp_path, inputs)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = start_ranks(["train", run_file(tmp_path, run)], logs, names=SLURM)
    try:
        codes = [process.wait(timeout=LIMIT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said
    assert "2 ranks" in said[0]
    assert said[1] == ""
    assert losses(metrics(Path(run["output_dir"]))) == pooled_losses


def test_relative_paths_may_stand_beside_the_run_file(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs)
    write_json(tmp_path / "beside.json", {"zero_optimization": {"stage": 2}})
    answers = run_ranks(1, dry_run_here, run_file(tmp_path, {**run, "deepspeed": "beside.json"}))
    assert answers[0][0] == 0
    assert "ZeRO-2" in answers[0][1]
