"""A tokenizer whose ids can be read, and small files."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% if tools %}T{{ tools | length }}{% endif %}{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def letter_tokenizer(
    *, template: str | None = TEMPLATE, merges: Iterable[tuple[str, str]] = (), bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token per character, plus one per merge; <s> before plain text where `bos`."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *string.printable, *("".join(merge) for merge in merges)]
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def words(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    """The tokens of ids joined by nothing: what the model reads."""
    return "".join(tokenizer.convert_ids_to_tokens([int(token) for token in ids]))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """A JSON Lines file; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def text_rows(count: int) -> list[dict[str, str]]:
    """Standard rows that differ from one another."""
    return [{"prompt": f"p{index}", "chosen": f" good{index}", "rejected": f" bad{index}"} for index in range(count)]
