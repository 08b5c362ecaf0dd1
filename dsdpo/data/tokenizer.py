"""The run's tokenizer, complete with what training needs of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from jinja2.exceptions import TemplateSyntaxError
from transformers import AutoTokenizer, GenerationConfig

from dsdpo.config.model import ModelConfig
from dsdpo.data.types import Tokenizer
from dsdpo.errors import ConfigError


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer of `model.tokenizer` or `model.path`, with `model.chat_template` and `model.pad_token` applied.

    Raises `ConfigError` when it cannot be loaded or has no such pad token, or its chat template is no Jinja.
    """
    source = model.tokenizer or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
        )
        tokenizer("a")  # what some settings and vocabularies make impossible
    except Exception as error:  # the libraries below raise whatever their parsers raise
        key = "model.tokenizer" if model.tokenizer else "model.path"
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"{key}: no tokenizer could be loaded from {source!r} ({first_line}); give one with model.tokenizer"
        ) from error
    if model.chat_template is not None:
        path = Path(model.chat_template)
        if not path.is_file():
            raise ConfigError(f"model.chat_template: no file {path}; give the path of a Jinja template")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"model.chat_template: {path} cannot be read as text ({error}); give a Jinja template"
            ) from error
    _check_template(tokenizer, "model.chat_template" if model.chat_template else f"the chat template of {source!r}")
    tokenizer.end_tokens = end_tokens(tokenizer, model)
    if model.pad_token is not None:
        if model.pad_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"model.pad_token: {model.pad_token!r} is not a token of {source!r}; "
                f"choose one that is, for example {tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = model.pad_token
    return tokenizer


def end_tokens(tokenizer: Tokenizer, model: ModelConfig) -> tuple[str, ...]:
    """The tokens that end a generation of the model: its tokenizer's EOS and those of its generation config."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    with suppress(OSError, ValueError, TypeError):  # most models without one
        config = GenerationConfig.from_pretrained(model.path, revision=model.revision)
        ids = config.eos_token_id
        found += [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(str(tokenizer.convert_ids_to_tokens(i)) for i in found if 0 <= i < len(tokenizer)))


def _check_template(tokenizer: Tokenizer, name: str) -> None:
    """Raises `ConfigError` for a chat template that is no valid Jinja, which would refuse every row."""
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{name}: line {error.lineno} is not valid Jinja: {error.message}; correct it") from error
    except Exception:  # it may ask for more than this; rows that it refuses are counted
        return


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that stands where no token does: of the pad token, else the end of sequence, else 0. Nothing sees it."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
