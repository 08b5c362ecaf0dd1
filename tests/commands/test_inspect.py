"""`dsdpo inspect`: what is counted, and that a pair is shown as it is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.__main__ import main
from tests.data.helpers import assistant, user
from tests.runs import settings

SUN, LONG = "what colour is the sun ?", "yellow " * 60


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": [user(question)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


ROWS = [
    pair(SUN, "the sun is yellow .", "the sun is red ."),
    pair(SUN, "the sun is red .", "the sun is yellow ."),  # the opposite of the first
    pair(SUN, "red .", LONG),  # cut
    pair(SUN, "the sun is yellow .", "the sun is red ."),  # the first again
    {"prompt": [user(SUN)], "chosen": [assistant("red .")]},  # dropped
]


@pytest.fixture(scope="module")
def run_file(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = settings(folder, inputs, data={"train": str(folder / "rows.jsonl"), "max_length": 40, "max_dropped_share": 1})
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def said_by(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_facts_of_all_pairs(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(capsys, run_file, "--sample", 0, "--ranks", 2)
    for words in ("4 pairs", "5 rows; dropped 1 missing_field; 1 truncated (25.0%); 1 duplicate", "on 2 ranks",
                  "2 pairs (50.0%) against an earlier one: 0 and 1, 1 and 3",
                  "2 responses chosen in one pair and rejected in another", "shorter in 25.0%"):  # fmt: skip
        assert words in said
    assert max(map(len, said.replace(str(run_file.parent), "").splitlines())) <= 80
    # 4 pairs of a prompt of 8 or 9 tokens: what a prompt costs once in place of twice.
    assert float(said.split("sharing")[1].split()[0]) > 1.2


def test_a_row_is_shown_with_what_is_shared_and_cut(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = said_by(capsys, run_file, "--row", 0)
    assert "[shared: the sun is][chosen:  yellow . <|end|>]" in first.replace("[shared:  ", "[shared: ")
    assert "[rejected:  red . <|end|>]" in first
    assert "[prompt: <|user|> what colour is the sun ? <|end|> <|assistant|>]" in first
    coloured = said_by(capsys, run_file, "--row", 0, "--color", "always")
    assert "\x1b[32m" in coloured
    assert "[prompt" not in coloured
    worst = said_by(capsys, run_file, "--worst", "--sample", 1)
    assert "rows.jsonl:3" in worst
    cut = int(worst.split(" tokens of the response cut")[0].split("… ")[-1])
    assert cut == 60 + 1 - (40 - int(worst.split("(")[-1].split(" prompt")[0]))
    with_ids = said_by(capsys, run_file, "--row", 0, "--tokens")
    assert "yellow⟨" in with_ids


def test_the_page_needs_no_network_and_has_every_token(run_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(run_file), "--worst", "--html", str(page)]) == 0
    text = page.read_text()
    assert "http" not in text
    assert "src=" not in text
    assert "tokens of the response cut" in text
    assert 'class="shared"' in text


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--row", "99"], "no source of data.train has so many rows"),
        (["--row", "4"], "makes no pair: missing_field"),
        (["--row", "-1"], "give 0 or more"),
        (["--row", "1", "--worst"], "keep one"),
        (["--eval"], "data.eval is null"),
        (["--ranks", "0"], "give 1 or more"),
        (["--html", "nowhere/x.html"], "no file that can be written"),
        (["--bla"], "is not an option"),
        (["--data.train", "nothing.jsonl"], "does not exist"),
    ],
)
def test_what_inspect_refuses(
    options: list[str], mentions: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run_file), *options]) == 2
    said = capsys.readouterr().err
    assert mentions in said
    assert said.count("dsdpo: ") == 1
