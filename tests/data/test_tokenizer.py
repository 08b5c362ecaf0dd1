"""The run's tokenizer: its chat template is checked, and which tokens end a generation is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsdpo.config.model import ModelConfig
from dsdpo.data.encode import make_encoder
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.errors import ConfigError
from tests.data.helpers import letter_tokenizer


def test_end_tokens_are_those_of_tokenizer_and_generation_config(tmp_path: Path) -> None:
    letter_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).end_tokens == ("</s>",)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 99999]}))
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert tokenizer.end_tokens == make_encoder(tokenizer, max_length=9).end_tokens == ("</s>", "<unk>")


def test_template_that_is_no_jinja_is_refused_by_name_and_line(tmp_path: Path) -> None:
    letter_tokenizer().save_pretrained(tmp_path)
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"model\.chat_template: line 2 is not valid Jinja"):
        load_tokenizer(ModelConfig(path=str(tmp_path), chat_template=str(broken)))
