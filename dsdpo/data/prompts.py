"""Fixed prompts out of a file, as token ids like those of training pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dsdpo.config.data import DataConfig, SourceConfig
from dsdpo.data.dropped_rows import KINDS, BadRow
from dsdpo.data.encode import encode_prompt, encoder_for
from dsdpo.data.examples import to_examples
from dsdpo.data.files import SUFFIXES, Row, has_known_suffix, read_file
from dsdpo.data.formats import RowRules, read_fields, rules_for
from dsdpo.data.types import Tokenizer
from dsdpo.errors import DataError

KEY = "evaluation.samples.prompts"
RESPONSES = ("chosen", "rejected", "completion", "completions")
# What stands for two responses behind a prompt that has none: the code that reads rows reads them with their responses.
STAND_INS = {"chosen": "a", "rejected": "b"}


@dataclass(frozen=True)
class Prompt:
    """One prompt as the models read it."""

    place: str  # in the file, e.g. prompts.jsonl:3
    ids: tuple[int, ...]


def read_prompt_rows(path: str, *, count: int) -> list[Row]:
    """The first rows of a file of prompts, or its first lines if it is text, each with its place.

    Raises DataError where the file is missing, not of a known format, or without a row.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"does not exist (looked in {Path.cwd()})"
        raise DataError(f"{KEY}: {path} {what}. Give a file of prompts.")
    if file.suffix.lower() != ".txt" and not has_known_suffix(file):
        raise DataError(f"{KEY}: {path}: the name does not end with a known format ({', '.join(('.txt', *SUFFIXES))}).")
    rows = list(islice(_lines(file) if file.suffix.lower() == ".txt" else read_file(file), count))
    if not rows:
        raise DataError(f"{KEY}: {path} is empty. Give at least one prompt.")
    for place, row in rows:
        if isinstance(row, BadRow):
            raise _refused(place, row)
    return rows


def encode_prompts(rows: list[Row], tokenizer: Tokenizer, data: DataConfig, *, text_as_chat: bool) -> list[Prompt]:
    """The rows as prompts, cut as training's are. `text_as_chat`: a prompt of plain text is a user's message.

    Raises DataError for the first row that is no prompt.
    """
    rules = rules_for(SourceConfig(path="prompts"), data)
    chat = text_as_chat and tokenizer.chat_template is not None
    encoder = encoder_for(tokenizer, data)
    prompts = []
    for place, row in rows:
        try:
            prompts.append(Prompt(place, tuple(encode_prompt(_example(row, rules, text_as_chat=chat), encoder))))
        except BadRow as bad:
            raise _refused(place, bad) from bad
    return prompts


def _lines(path: Path) -> Iterator[Row]:
    """The lines of a text file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}. Check that the file is whole.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path.name}:{number}", {"prompt": line}


def _example(row: Any, rules: RowRules, *, text_as_chat: bool) -> dict[str, Any]:
    """The row as an example, with stand-ins for its responses if it has none. Raises BadRow."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        return to_examples(row, rules)[0]
    fields = read_fields(row, rules)
    if any(fields[name] is not None for name in RESPONSES):
        return to_examples(row, rules)[0]
    if fields["prompt"] is None:
        raise BadRow("missing_field", f"prompt is missing; the fields are: {', '.join(row) or 'none'}")
    return to_examples({**row, **STAND_INS}, replace(rules, text_as_chat=rules.text_as_chat or text_as_chat))[0]


def _refused(place: str, bad: BadRow) -> DataError:
    return DataError(f"{KEY}: {place}: {KINDS[bad.kind]}: {bad.detail}. Correct the row, or take it out.")
