"""Fixed prompts out of files of every kind, as the models read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.data import DataConfig
from dsdpo.data.prompts import Prompt, encode_prompts, read_prompt_rows
from dsdpo.errors import DataError
from tests.data.helpers import assistant, letter_tokenizer, user, words

QUESTION = "What is the sun ?"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return letter_tokenizer()


def read(path: Path, content: str, tokenizer: Any, *, count: int = 8, chat: bool = True, **data: Any) -> list[Prompt]:
    path.write_text(content)
    settings = DataConfig.model_validate({"train": "d", **data})
    return encode_prompts(read_prompt_rows(str(path), count=count), tokenizer, settings, text_as_chat=chat)


def test_every_kind_of_file_gives_the_same_prompt(tokenizer: Any, tmp_path: Path) -> None:
    messages = [user(QUESTION)]
    pair = {"prompt": messages, "chosen": [assistant("Hot .")], "rejected": [assistant("Cold .")]}
    for name, content in {
        "a.txt": f"\n{QUESTION}\n",
        "a.jsonl": json.dumps({"prompt": QUESTION}),
        "b.jsonl": json.dumps({"prompt": messages}),
        "c.jsonl": json.dumps(pair),
        "d.jsonl": json.dumps({"prompt": messages, "completion": [assistant("Hot .")], "label": True}),
        "e.jsonl": json.dumps({"instruction": QUESTION}),
        "a.json": json.dumps([QUESTION]),
        "a.csv": f"prompt\n{QUESTION}\n",
    }.items():
        [prompt] = read(tmp_path / name, content, tokenizer)
        assert words(tokenizer, prompt.ids) == f"u{QUESTION};a", name
    assert read(tmp_path / "a.txt", f"\n{QUESTION}\n", tokenizer)[0].place == "a.txt:2"


def test_text_stays_text_where_training_is_text(tokenizer: Any, tmp_path: Path) -> None:
    [prompt] = read(tmp_path / "a.txt", QUESTION, tokenizer, chat=False)
    assert words(tokenizer, prompt.ids) == QUESTION
    [asked] = read(tmp_path / "a.txt", QUESTION, tokenizer, chat=False, text="chat")
    assert words(tokenizer, asked.ids) == f"u{QUESTION};a"
    [opened] = read(tmp_path / "a.txt", QUESTION, letter_tokenizer(template=None, bos=True))
    assert words(tokenizer, opened.ids) == f"<s>{QUESTION}"


def test_only_the_first_prompts_are_read(tokenizer: Any, tmp_path: Path) -> None:
    lines = "".join(f"{QUESTION} {word}\n" for word in ("a", "b", "c"))
    assert [prompt.place for prompt in read(tmp_path / "a.txt", lines, tokenizer, count=2)] == ["a.txt:1", "a.txt:2"]


@pytest.mark.parametrize(
    ("name", "content", "mention"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.docx", "a", "does not end with a known format"),
        ("a.jsonl", '{"text": "a"}', "a.jsonl:1: a field is missing: prompt is missing; the fields are: text"),
        ("b.jsonl", '{"prompt": 3}', "b.jsonl:1: a field has the wrong type"),
        ("c.jsonl", '{"prompt": "a"}\n{"prompt"', "c.jsonl:2: not valid JSON"),
        ("d.jsonl", '{"prompt": ""}', "d.jsonl:1: a field is empty"),
        ("e.json", "[3]", "e.json[0]: a field has the wrong type"),
    ],
)
def test_what_is_no_prompt_is_named(name: str, content: str, mention: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^evaluation.samples.prompts: ") as error:
        read(tmp_path / name, content, tokenizer)
    assert mention in str(error.value)


def test_a_missing_file_a_folder_and_a_long_prompt(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_prompt_rows(str(tmp_path / "none.txt"), count=1)
    with pytest.raises(DataError, match="is a folder"):
        read_prompt_rows(str(tmp_path), count=1)
    with pytest.raises(DataError, match=r"a\.txt:1: the prompt alone fills data\.max_length"):
        read(tmp_path / "a.txt", "word " * 50, tokenizer, max_length=20)
