"""`dsdpo prepare`: the tokens that training then finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dsdpo.__main__ import main
from dsdpo.config.load import load_run, run_parser
from dsdpo.data.tokenize import prepare_pairs
from dsdpo.data.tokenizer import load_tokenizer
from tests.runs import settings


def test_prepare_makes_what_training_opens(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = settings(tmp_path, inputs)
    data["data"] |= {"cache_dir": str(tmp_path / "cache"), "eval": str(inputs / "few.jsonl")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    assert main(["prepare", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "training data: " in said
    assert "held-out data: " in said
    assert "dropped none, 0 truncated" in said
    made = sorted((tmp_path / "cache" / "dsdpo").iterdir())
    assert len(made) == 2
    run, _ = load_run([str(tmp_path / "run.yaml")], run_parser("test", ""))
    tokenizer = load_tokenizer(run.model)
    folder = prepare_pairs(run.data.train, tokenizer, data=run.data, seed=run.train.seed, default_split="train")
    assert folder in made
    assert sorted((tmp_path / "cache" / "dsdpo").iterdir()) == made


def test_sources_have_the_names_of_the_run_that_asks(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = settings(tmp_path, inputs)
    monkeypatch.chdir(inputs)
    for path in (str(inputs / "few.jsonl"), "few.jsonl"):
        data["data"] = {"train": {"path": path, "split": "train[:2]"}, "cache_dir": str(tmp_path / "cache")}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
        assert main(["prepare", str(tmp_path / "run.yaml")]) == 0
        assert f"  {path} train[:2]: 2 rows, 2 pairs" in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "dsdpo").iterdir())) == 1, "prepared again for another way to write the path"
