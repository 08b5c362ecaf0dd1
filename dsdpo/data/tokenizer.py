"""The run's tokenizer, complete with what training needs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dsdpo.config.run import ModelConfig
from dsdpo.errors import ConfigError


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of `model.tokenizer` or `model.path`, with `model.chat_template` and `model.pad_token` applied.

    Raises `ConfigError` when it cannot be loaded or has no pad token.
    """
    source = model.tokenizer or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except Exception as error:  # the libraries below raise whatever their parsers raise
        key = "model.tokenizer" if model.tokenizer else "model.path"
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}: no tokenizer could be loaded from {source!r} ({first_line}); give one with model.tokenizer"
        ) from error
    if model.chat_template is not None:
        path = Path(model.chat_template)
        if not path.is_file():
            raise ConfigError(f"model.chat_template: no file {path}; give the path of a Jinja template")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if model.pad_token is not None:
        if model.pad_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"model.pad_token: {model.pad_token!r} is not a token of {source!r}; "
                f"choose one that is, for example {tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"model.pad_token: the tokenizer of {source!r} has no pad token; name the token to pad with, "
            f"for example model.pad_token: {tokenizer.eos_token!r}"
        )
    return tokenizer
