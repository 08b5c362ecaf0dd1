"""The date that chat templates write: a setting, or the day of the first preparation, never the day of the call."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from dsdpo.config.data import DataConfig
from dsdpo.data.dates import settled_date
from dsdpo.data.encode import Encoded, encode_examples, make_encoder
from dsdpo.data.render import Renderer
from tests.data.helpers import TEMPLATE, assistant, letter_tokenizer, user, words

DATED = "{{ strftime_now('%d %b %Y') }}{% if strftime_now is defined %}!{% endif %}\n " + TEMPLATE
EXAMPLE = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}


def data(cache: Path, **settings: str) -> DataConfig:
    return DataConfig.model_validate({"train": "d", "cache_dir": str(cache), **settings})


def test_template_is_told_the_date_of_the_setting() -> None:
    tokenizer = letter_tokenizer(template=DATED)
    (told,) = encode_examples([EXAMPLE], make_encoder(tokenizer, max_length=99, date="2024-02-03"))
    assert isinstance(told, Encoded), told
    undated = tokenizer.apply_chat_template(EXAMPLE["prompt"], tokenize=False, add_generation_prompt=True)
    today = date.today().strftime("%d %b %Y")
    assert undated.startswith(f"{today}!")
    assert words(tokenizer, told.prompt) == undated.replace(today, "03 Feb 2024")  # and nothing else is changed


@pytest.mark.parametrize("told", ["2024-05-01", "2024-09-01"])
def test_marks_of_a_template_stand_after_the_date_of_the_setting(told: str) -> None:
    """The names of months are of different lengths, so that today's would move the marks in one of two."""
    tokenizer = letter_tokenizer(
        template="{{ strftime_now('%B') }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfor %}"
    )
    marks = Renderer(tokenizer, date=told).marks([assistant("yes")], {})
    month = date.fromisoformat(told).strftime("%B")
    assert marks == [0] * len(month) + [1] * len("yes")


def test_first_day_stands_on_later_days(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(template=DATED)
    first = settled_date(data(tmp_path), tokenizer)
    assert first == date.today().isoformat()
    (note,) = (tmp_path / "dsdpo").iterdir()
    note.write_text("2023-04-05")  # as if that had been the first day
    assert settled_date(data(tmp_path), tokenizer) == "2023-04-05"
    assert settled_date(data(tmp_path, date="2020-01-01"), tokenizer) == "2020-01-01"
    assert settled_date(data(tmp_path), letter_tokenizer()) is None


def test_invalid_dates_are_refused() -> None:
    with pytest.raises(ValueError, match="give a date as YYYY-MM-DD"):
        DataConfig.model_validate({"train": "d", "date": "tomorrow"})
