"""What dsdpo uses of a transformers tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A `transformers.PreTrainedTokenizerBase`."""

    chat_template: Any  # Jinja source, or several by name; None: there is none
    pad_token: str | None
    pad_token_id: int
    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    end_tokens: tuple[str, ...]  # of dsdpo's own: those that end a response, see `load_tokenizer`
    special_tokens_map: dict[str, Any]
    all_special_tokens: list[str]

    def __len__(self) -> int:
        """Tokens, added ones included."""
        ...

    def __call__(self, text: Any, **options: Any) -> Any:
        """Token ids of text, in a mapping under `input_ids`."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Text or token ids of a conversation."""
        ...

    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def decode(self, token_ids: Any, **options: Any) -> str: ...

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any: ...
