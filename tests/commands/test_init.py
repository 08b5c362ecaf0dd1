"""`dsdpo init`, `dsdpo completion` and `--help-section`: what a user has before the first run."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsdpo.__main__ import main
from dsdpo.commands.completion import choices, script, settings
from dsdpo.commands.init import OF_STRATEGY, STRATEGIES
from dsdpo.commands.table import COMMANDS
from dsdpo.config.load import dotted_keys, load_run, run_parser
from dsdpo.config.loss import LOSSES
from dsdpo.config.shipped import recipes, shipped
from tests.commands.processes import environment_of

ROOT = Path(__file__).parents[2]
OWN = ["--model", "some/model", "--data", "pairs.jsonl"]


def load(folder: Path) -> dict[str, object]:
    """The run that `dsdpo train run.yaml` would have in this folder."""
    run, _ = load_run([str(folder / "run.yaml")], run_parser("dsdpo train", ""))
    return run.model_dump(mode="json")


@pytest.mark.parametrize("recipe", recipes())
def test_a_run_of_ones_own_from_every_recipe(recipe: str, tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "own"), "--recipe", recipe, *OWN, "--gpus", "3"]) == 0
    run = load(tmp_path / "own")
    assert run["model"]["path"] == "some/model"
    assert run["model"]["pad_token"] is None, "a token of the recipe's own model"
    assert [source["path"] for source in run["data"]["train"]] == ["pairs.jsonl"]
    assert run["data"]["eval"] is None, "held-out pairs of the recipe's own data"
    assert Path(run["deepspeed"]).resolve() == (tmp_path / "own" / "policy.json").resolve()
    recipe_run = yaml.safe_load(recipes()[recipe].read_text())
    assert run["loss"]["type"] == recipe_run.get("loss", {}).get("type", "sigmoid")
    script = tmp_path / "own" / "train.sh"
    assert "--num_gpus 3 --log_level=error --module dsdpo train run.yaml" in script.read_text()
    assert os.access(script, os.X_OK)


def test_options_lay_over_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("")
    options = ["--strategy", "separate", "--reference", "other/model", "--deepspeed", "zero2"]
    options += ["--reference-deepspeed", "zero0", "--eval", "held/out", "--model", "m", "--data", "mine.jsonl"]
    assert main(["init", "own", *options, "--launcher", "slurm", "--nodes", "2", "--gpus", "4"]) == 0
    run = load(tmp_path / "own")
    assert run["reference"]["path"] == "other/model"
    assert run["data"]["train"][0]["path"] == str(tmp_path / "mine.jsonl"), "found from here, so found from anywhere"
    assert run["data"]["eval"][0]["path"] == "held/out"
    assert Path("own/policy.json").read_text() == shipped("ds_configs/zero2.json").read_text()
    assert Path("own/reference.json").read_text() == shipped("ds_configs/reference/zero0.json").read_text()
    batch = Path("own/train.sbatch").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=4\n" in batch


REFUSED = {
    "--model and --data missing": [],
    "--data missing": ["--model", "m"],
    "no recipe nope": [*OWN, "--recipe", "nope"],
    "keep one": [*OWN, "--recipe", "mpo", "--strategy", "separate"],
    "--gpus is 0": [*OWN, "--gpus", "0"],
    "needs --launcher ssh or slurm": [*OWN, "--nodes", "2", "--launcher", "local"],
    "invalid choice: 'zero9'": [*OWN, "--deepspeed", "zero9"],
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_cannot_be_written_is_one_message(
    expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "own"), *REFUSED[expected]]) == 2
    output, errors = capsys.readouterr()
    assert expected in errors
    assert (output, list(tmp_path.iterdir())) == ("", [])


def in_terminal(words: list[str], answers: str, folder: Path) -> tuple[int, str]:
    """Exit code and screen of `dsdpo init` in a terminal of its own where `answers` are typed, Ctrl-D after them."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "dsdpo", "init", *words]
    environment = {**environment_of(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder, env=environment)
    os.close(terminal)
    os.write(master, answers.encode() + b"\x04")
    screen = b""
    while True:
        try:
            screen += os.read(master, 65536)
        except OSError:  # the other end is closed
            break
    os.close(master)
    return process.wait(timeout=60), screen.decode()


def test_what_no_option_says_is_asked_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("")
    code, screen = in_terminal(["own"], "adapter\nsome/model\nmine.jsonl\n\n3\n", tmp_path)
    assert code == 0, screen
    run = load(tmp_path / "own")
    assert run["reference"]["strategy"] == "adapter"
    assert run["model"]["path"] == "some/model"
    assert run["data"]["train"][0]["path"] == str(tmp_path / "mine.jsonl")
    assert run["data"]["eval"] is None
    assert "--num_gpus 3 " in (tmp_path / "own" / "train.sh").read_text()
    assert STRATEGIES.keys() == OF_STRATEGY.keys()
    for question in (
        *OF_STRATEGY,
        "strategy [separate]: ",
        "model to train",
        "preference pairs",
        "held-out pairs [none]",
    ):
        assert question in screen
    code, screen = in_terminal(["two", "--recipe", "simpo", *OWN, "--eval", "held/out"], "0\n", tmp_path)
    assert code == 2
    assert "'0' is no number of processes" in screen
    assert "strategy" not in screen
    assert in_terminal(["three"], "nearby\n", tmp_path)[0] == 2
    code, screen = in_terminal(["four", "--strategy", "trdpo"], "", tmp_path)
    assert code == 2
    assert "no answer for --model" in screen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "own"]


def test_nothing_is_overwritten_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    assert main(["init", str(tmp_path), *OWN]) == 2
    assert "has run.yaml already" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "mine"
    assert main(["init", str(tmp_path), *OWN, "--force"]) == 0
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / "file" / "below"), *OWN]) == 2


def test_a_file_here_comes_before_the_one_that_came_with_dsdpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.path", "m", "--data.train", "d", "--output_dir", "o"]
    options += ["--deepspeed", "ds_configs/zero1.json"]

    def deepspeed() -> str:
        return load_run(["launch/recipes/demo.yaml", *options], run_parser("dsdpo train", ""))[0].deepspeed

    assert deepspeed() == str(shipped("ds_configs/zero1.json"))
    Path("ds_configs").mkdir()
    Path("ds_configs/zero1.json").write_text("{}")
    assert deepspeed() == "ds_configs/zero1.json"
    assert shipped("ds_configs/../../config/run.py") is None
    assert shipped("elsewhere/zero1.json") is None


def completed(*words: str) -> list[str]:
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    asked = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _dsdpo; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", f"{script('bash')}\n{asked}"], capture_output=True, text=True, check=True, env=environment_of()
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_of_commands_settings_and_choices() -> None:
    assert completed("dsdpo", "pre") == [name for name in COMMANDS if name.startswith("pre")]
    assert completed("dsdpo", "train", "RUN.yaml", "--loss.label_s") == ["--loss.label_smoothing"]
    assert completed("dsdpo", "train", "RUN.yaml", "--loss.type", "aot") == ["aot", "aot_unpaired"]
    assert completed("dsdpo", "train", "RUN.yaml", "--data.shuffle", "") == ["true", "false"]
    assert set(settings()) <= set(dotted_keys())
    assert choices()["loss.type"] == list(LOSSES)
    for shell in ("zsh", "fish"):
        assert "loss.beta" in script(shell)
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=script(shell), text=True, check=True)


def test_help_of_one_section_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for argv, shown in (
        (["--help-section", "loss"], (True, False)),
        (["RUN.yaml", "--help-section=model.lora"], (False, True)),
        (["--help"], (True, True)),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["train", *argv])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        assert "undefined" not in text
        assert ("--loss.beta" in text, "--model.lora.r" in text) == shown
    assert main(["train", "--help-section", "los"]) == 2
    assert "did you mean loss?" in capsys.readouterr().err
    assert main(["train", "--help-section"]) == 2
