"""`launch/recipes/iterative`: rounds on the demo, whose references are what they should be, and broken hand-offs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dsdpo.errors import ConfigError, DataError
from tests.commands.processes import environment_of, finish
from tests.warm import warm_python

FOLDER = Path(__file__).parents[1] / "launch" / "recipes" / "iterative"
ROOT = Path(__file__).parents[1]
LIMIT_S = 580


def test_each_round_is_anchored_to_the_model_it_starts_from(tmp_path: Path) -> None:
    path = f"{Path(warm_python()).parent}:{environment_of()['PATH']}"
    words = [str(FOLDER / "demo.sh"), "--rounds", "2", "--train.max_steps", "2", "--data.eval", "null"]
    answer = finish(["bash", *words], limit_s=LIMIT_S, cwd=tmp_path, PATH=path, PYTHONPATH=str(ROOT))
    assert answer.returncode == 0
    first, second = json.loads((tmp_path / "runs/rounds/rounds.json").read_text())
    assert second["reference"] == second["policy"] == "runs/rounds/round-1/run/model"
    assert first["reference_weights"] != second["reference_weights"]
    metrics = (tmp_path / "runs/rounds/round-2/run/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["loss"] == pytest.approx(0.693147, abs=1e-5), "policy and reference start alike"
    assert second["reference_weights"][:12] in answer.stdout


@pytest.mark.nightly
def test_rounds_anchored_to_the_start_train_on_the_pairs_that_are_kept(tmp_path: Path) -> None:
    path = f"{Path(warm_python()).parent}:{environment_of()['PATH']}"
    words = [str(FOLDER / "demo.sh"), "--rounds", "2", "--train.max_steps", "2", "--data.eval", "null"]
    words += ["--keep", "not right"]
    finish(["bash", *words], limit_s=LIMIT_S, cwd=tmp_path, PATH=path, PYTHONPATH=str(ROOT), REFERENCE="first")
    folder = tmp_path / "runs" / "rounds"
    first, second = json.loads((folder / "rounds.json").read_text())
    assert first["reference"] == second["reference"] == "runs/demo-inputs/model"
    assert first["reference_weights"] == second["reference_weights"]
    assert second["policy"] == "runs/rounds/round-1/run/model"
    assert not (folder / "round-1" / "kept.jsonl").exists(), "there is no reward before anything is learned"
    kept = pq.read_table(folder / "round-2" / "scores.parquet").to_pydict()
    written = (folder / "round-2" / "kept.jsonl").read_text().splitlines()
    generated = (folder / "round-2" / "generations.jsonl").read_text().splitlines()
    assert len(written) == len(kept["row"])
    assert 0 < len(written) < len(generated)
    assert not any(kept["right"])
    assert max(map(abs, kept["margin"])) > 1e-4, "scored under the model of the round before"
    settings = yaml.safe_load((folder / "round-2" / "run" / "config.yaml").read_text())
    assert settings["data"]["train"][0]["path"] == "runs/rounds/round-2/kept.jsonl"


def test_a_round_does_not_start_from_an_adapter_alone(tmp_path: Path) -> None:
    model_of = runpy.run_path(str(FOLDER / "rounds.py"))["model_of"]
    (tmp_path / "model").mkdir()
    assert model_of(tmp_path) == str(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"add --export\.merge_adapter true"):
        model_of(tmp_path)
    (tmp_path / "merged").mkdir()
    assert model_of(tmp_path) == str(tmp_path / "merged")


BROKEN = {
    "no JSON": "nonsense",
    "no prompt": '{"completions": ["a", "b"], "scores": [1, 0]}',
    "one completion": '{"prompt": "p", "completions": ["a"], "scores": [1]}',
    "fewer scores": '{"prompt": "p", "completions": ["a", "b"], "scores": [1]}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_hand_off_is_refused_by_line(kind: str, tmp_path: Path) -> None:
    check = runpy.run_path(str(FOLDER / "rounds.py"))["check"]
    file = tmp_path / "generations.jsonl"
    file.write_text('{"prompt": "p", "completions": ["a", "b"], "scores": [1, 0]}\n')
    check(file)
    file.write_text(file.read_text() + BROKEN[kind] + "\n")
    with pytest.raises(DataError, match=r"generations\.jsonl:2: give an object with prompt"):
        check(file)


def test_wrong_arguments_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(FOLDER / "rounds.py"))["main"]
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    prompts, nowhere = str(tmp_path / "prompts.jsonl"), str(tmp_path / "none.jsonl")
    for words, expected in (
        (["no.yaml", "--prompts", prompts, "--generate", "true"], "no.yaml"),
        (["launch/recipes/demo.yaml", "--prompts", nowhere, "--generate", "true"], "none.jsonl does not exist"),
        (["no.yaml", "--prompts", prompts, "--generate", "true", "--rounds", "0"], "--rounds is 0"),
        (["launch/recipes/demo.yaml", "--prompts", prompts, "--generate", "true", "--folder", str(tmp_path / "r")],
         "was not written by --generate"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["rounds.py", *words])
        assert main() == 2
        assert expected in capsys.readouterr().err
