"""`dsdpo demo`: the same inputs each time, an honest held-out part, and a run that learns."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from dsdpo.__main__ import main as dsdpo_main
from dsdpo.commands.demo import COLOURS, QUESTIONS, make_inputs, make_rows
from tests.commands.processes import finish
from tests.runs import metrics
from tests.warm import warm_dsdpo

LIMIT_S = 400
ROOT = Path(__file__).parents[2]


def test_inputs_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_inputs(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert {"train.jsonl", "test.jsonl", "model/model.safetensors"} <= {str(path) for path in files}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert make_rows(0) != make_rows(1)


def test_held_out_questions_were_never_asked_about_that_thing() -> None:
    train, test = make_rows(0)
    asked = {row["prompt"][0]["content"] for row in train}
    held_out = {row["prompt"][0]["content"] for row in test}
    assert not asked & held_out
    things = {thing for group in COLOURS.values() for thing in group}
    assert all(any(f" {thing} " in question for question in asked) for thing in things), "a thing never seen"
    assert len(asked) == len(things) * (len(QUESTIONS) - 2)


def test_only_the_colour_tells_chosen_from_rejected() -> None:
    right = {thing: colour for colour, group in COLOURS.items() for thing in group}
    chosen_counts, rejected_counts = dict.fromkeys(COLOURS, 0), dict.fromkeys(COLOURS, 0)
    for row in itertools.chain(*make_rows(0)):
        chosen, rejected = row["chosen"][0]["content"].split(), row["rejected"][0]["content"].split()
        different = [(good, bad) for good, bad in zip(chosen, rejected, strict=True) if good != bad]
        ((good, bad),) = different
        thing = next(word for word in row["prompt"][0]["content"].split() if word in right)
        assert right[thing] == good
        chosen_counts[good] += 1
        rejected_counts[bad] += 1
    # Preferring one colour everywhere would win nothing.
    assert all(abs(chosen_counts[colour] / rejected_counts[colour] - 1) < 0.25 for colour in COLOURS)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel installs it, and nothing else of the repository."""
    source, folder = tmp_path_factory.mktemp("source") / "dsdpo", tmp_path_factory.mktemp("installed")
    source.mkdir()
    for name in ("dsdpo", "ds_configs", "docs", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*wheel, str(source)], check=True, timeout=LIMIT_S)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder)
    return folder


def test_a_wheel_holds_what_the_repository_has(installed: Path) -> None:
    for part in ("ds_configs", "docs", "launch"):
        ours = sorted(path.relative_to(ROOT) for path in (ROOT / part).rglob("*") if path.is_file())
        theirs = installed / "dsdpo" / "shipped"
        assert ours == sorted(path.relative_to(theirs) for path in (theirs / part).rglob("*") if path.is_file())
    assert (installed / "dsdpo" / "py.typed").is_file()


def test_messages_of_a_wheel_name_pages_that_it_has(installed: Path, tmp_path: Path) -> None:
    asked = "from dsdpo.__main__ import main, page; main(['--help']); print(page('a.md#b'))"
    answer = finish([sys.executable, "-c", asked], limit_s=LIMIT_S, cwd=tmp_path, PYTHONPATH=str(installed))
    shown = re.findall(r"documentation: (.+)$|^(/.+)$", answer.stdout, re.MULTILINE)
    assert [Path(index or path) for index, path in shown] == [
        installed / "dsdpo" / "shipped" / "docs" / name for name in ("README.md", "a.md#b")
    ]
    code = "".join(path.read_text() for path in (ROOT / "dsdpo").rglob("*.py"))
    pages = set(re.findall(r"""page\(["']([\w-]+\.md)""", code))
    assert {"data.md", "objectives.md"} <= pages
    assert all((installed / "dsdpo" / "shipped" / "docs" / name).is_file() for name in pages)


# Half of its steps, with a larger beta and without evaluations on the way; and as the docs have it.
SHORT = ["--train.max_steps", "75", "--loss.beta", "0.2", "--evaluation.every_steps", "75"]


@pytest.mark.parametrize("options", [SHORT, pytest.param([], marks=pytest.mark.nightly)], ids=["short", "whole"])
def test_demo_from_a_wheel_in_an_empty_folder_learns_and_shows_it(
    options: list[str], installed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "demo"
    answer = finish([*warm_dsdpo(), "demo", *options], limit_s=LIMIT_S, cwd=tmp_path, PYTHONPATH=str(installed))
    assert answer.returncode == 0
    assert "hint" not in answer.stdout + answer.stderr
    shown = yaml.safe_load((folder / "config.yaml").read_text())
    assert shown["deepspeed"] == str(installed / "dsdpo" / "shipped" / "ds_configs" / "zero3.json")
    folder = Path("runs/demo")
    rows = metrics(tmp_path / folder)
    held_out = [row for row in rows if "eval/loss" in row]
    assert abs(held_out[0]["eval/loss"] - 0.693147) < 1e-5
    assert held_out[-1]["eval/rewards/accuracies"] > 0.9
    assert held_out[-1]["eval/rewards/margins"] > 0.5
    assert re.search(r"rewards/accuracies +0\.\d+ +(0\.9\d+|1\.0000)", answer.stdout), "no table"
    said = re.search(r"^picture +(.+)$", answer.stdout, re.MULTILINE)
    assert said is not None
    assert (tmp_path / said[1]).read_bytes().startswith(b"\x89PNG")
    for shown in (f"model    {folder / 'model'}", f"metrics  {folder / 'metrics.jsonl'}", "dsdpo init FOLDER"):
        assert shown in answer.stdout
    assert (tmp_path / folder / "model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / folder / "deepspeed_reference.json").read_text())["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ranks", "0"], "--ranks is 0: give 1 or more"),
        (["--ranks", "x"], "argument --ranks: invalid int value: 'x'"),
        (["--loss.betta", "1"], "did you mean --loss.beta?"),
        (["--output_dir", "a\0b"], "holds a NUL"),
    ],
)
def test_wrong_options_are_told_before_anything_is_written(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dsdpo_main(["demo", *argv]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
