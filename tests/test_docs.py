"""The docs: no broken link, every command one that there is, and the quick tour done as it stands."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsdpo.__main__ import main
from dsdpo.commands.table import COMMANDS
from dsdpo.config.load import dotted_keys
from dsdpo.errors import ConfigError
from tests.commands.processes import finish, free_port
from tests.warm import warm_python

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("launch/recipes/*/README.md"),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`(dsdpo [a-z]+ [^`|]+)`")
REFUSED = re.compile(
    r"usage:|not an option|unrecognized|invalid choice|expected|required|must be|no command|needs a value"
)
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
LIMIT_S = 400


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", text)) for text in headings]
    return {text.strip().lower().replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_is_broken(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}: no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {posixpath.normpath(link.partition("#")[0]) for link in LINK.findall(index)}
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - linked == {"README.md"}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every dsdpo command in the docs, with the page that has it."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for name in ("dsdpo", ".venv/bin/dsdpo", "./train.sh"):
                    if name in words[:-1]:
                        rest = words[words.index(name) + 1 :]
                        yield str(page.relative_to(ROOT)), ["train", *rest] if name == "./train.sh" else rest


def test_every_command_in_the_docs_is_there_with_its_options() -> None:
    found = list(commands())
    assert len(found) > 15
    settings = {f"--{key}" for key in dotted_keys()}
    for page, (name, *words) in found:
        where = f"{page}: dsdpo {name} {' '.join(words)}"
        assert name in COMMANDS or name.startswith("-"), where
        source = ROOT / "dsdpo" / "commands" / f"{name}.py"
        texts = (
            source,
            *(ROOT / f"dsdpo/commands/{each}.py" for each in ("arguments", "model_arguments", "target", "parsing")),
            ROOT / "dsdpo/config/load.py",
            ROOT / "dsdpo/accelerator.py",
        )
        own = {option for text in texts if text.is_file()
               for option in re.findall(r"\"(--[a-z-]+)\"", text.read_text(encoding="utf-8"))}  # fmt: skip
        for word in words:
            option = word.split("=")[0]
            if option.startswith("--"):
                assert option in own | settings | {"--help", "--resume"}, f"{where}: {option}"
            if word.startswith(("launch/", "ds_configs/", "examples/")):
                assert any(ROOT.glob(word)), f"{where}: {word}"


def whole_commands() -> dict[tuple[str, ...], str]:
    """Every dsdpo command in blocks, and those in running text that say what they work on, with a page that has it."""
    found = {tuple(words): page for page, words in commands()}
    for page in PAGES:
        for span in SPAN.findall(page.read_text(encoding="utf-8")):
            words = tuple(shlex.split(span)[1:])
            if words[0] in COMMANDS and not words[1].startswith("-") and "..." not in words and "[" not in span:
                found.setdefault(words, str(page.relative_to(ROOT)))
    return {words: page for words, page in found.items() if not set(words) & {"--help", "--help-section", "demo"}}


def arranged(folder: Path, inputs: Path) -> None:
    """What the docs' names stand for: a run file with its data and JSONs; no RUN, MODEL or ADAPTER, which take long."""
    text = (ROOT / "launch" / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    run = text.replace("runs/demo-inputs", str(inputs)).replace("max_length: 64", "max_length: 2048")
    for name in ("RUN.yaml", "run.yaml"):
        (folder / name).write_text(run)
    for name in ("ds_configs", "launch", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    (folder / "runs" / "demo-inputs").symlink_to(inputs)
    for name in ("prefs.jsonl", "pairs.jsonl", "held_out.jsonl", "prompts.jsonl"):
        (folder / name).symlink_to(inputs / "few.jsonl")
    (folder / "THEIR.yaml").symlink_to(ROOT / "tests" / "commands" / "foreign" / "trl.yaml")
    (folder / "THEIR.sh").symlink_to(ROOT / "tests" / "commands" / "foreign" / "openrlhf.sh")


def test_every_command_in_the_docs_is_taken_as_it_is_printed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done, wrong = 0, []
    for number, (words, page) in enumerate(whole_commands().items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        arranged(folder, inputs)
        where = f"{page}: dsdpo {shlex.join(words)}"
        name, *rest = (word for word in words for word in (sorted(glob.glob(word)) if "*" in word else [word]))
        if name == "convert" and "run.yaml" in rest:
            (folder / "run.yaml").unlink()
        command = COMMANDS[name]
        if command.parse and command.meets:  # what trains is checked as far as its settings
            named = any(word.lower().endswith(".yaml") for word in rest)
            rest += ["--reference.strategy", "precomputed"] if name == "precompute" else []
            try:
                command.parse(rest if named else ["run.yaml", *rest])
            except ConfigError as error:
                wrong.append(f"{where}: {error}")
            continue
        code = main([name, *rest])
        said = capsys.readouterr().err
        if code not in (0, 2) or (code == 2 and REFUSED.search(said)):
            wrong.append(f"{where}: {said}")
        done += code == 0
    assert not wrong, "\n".join(wrong)
    assert done >= 10, "commands that need no trained run end well"


def test_the_quick_tour_works_as_it_stands(tmp_path: Path) -> None:
    from dsdpo.commands.demo import make_inputs

    text = (ROOT / "docs" / "quick-tour.md").read_text(encoding="utf-8")
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    assert lines[0] == "dsdpo demo", "which tests/commands/test_demo.py does"
    made = tmp_path / "runs" / "demo-inputs"
    make_inputs(made)
    for name, rows in (("train.jsonl", 320), ("test.jsonl", 24)):  # what the commands do needs no more
        (made / name).write_text("".join((made / name).read_text().splitlines(keepends=True)[:rows]))
    (tmp_path / "bin").mkdir()
    # The launcher itself, whose ranks need not import the libraries anew.
    launcher = f"-m deepspeed.launcher.runner --master_port={free_port()}"
    for name, command in (("dsdpo", "-m dsdpo"), ("deepspeed", launcher)):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {warm_python()} {command} "$@"\n')
        script.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    tour = "\n".join(["set -e", *lines[1:]])
    answer = finish(["bash", "-c", tour], limit_s=LIMIT_S, cwd=tmp_path, PATH=path, PYTHONPATH=str(ROOT))
    assert answer.returncode == 0
    for written in ("output/model/model.safetensors", "output/metrics.png", "trained/config.json"):
        assert (tmp_path / "tour" / written).is_file(), written
