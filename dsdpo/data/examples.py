"""One row of a file to one example: prompt, chosen and rejected, as text or as messages.

Forms that are understood:

- *text*: chosen and rejected are strings. They stay text, also where the model has a chat template: how a dialogue
  that somebody flattened to a string maps back to messages is a guess, and a wrong guess would be silent. That holds
  for the raw Anthropic-HH form too.
- *messages*: chosen and rejected are lists of {role, content}, or one such message.
- A prompt of one form with responses of the other becomes messages: a string prompt is a user message, a string
  response an assistant message.
- An implicit prompt (no prompt field, or a string prompt beside whole dialogues) is what the dialogues share from
  the start: for messages, whole messages; for text with "\\n\\nAssistant:" in the shared part, up to and including its
  last occurrence (Anthropic HH); for other text, cut back to the end of a word or line.
- Responses that repeat an explicit prompt's messages have them removed.
- `system` becomes a system message where the prompt has none; before a text prompt it stands as a paragraph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsdpo.data.dropped_rows import BadRow

FIELDS = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs")
HH_TURN = "\n\nAssistant:"

Message = dict[str, Any]
Turns = str | list[Message]


def to_example(row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row as {prompt, chosen, rejected} of one form, plus tools and chat_template_kwargs where it has them.

    `columns` maps our field names to the row's. Raises BadRow.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("wrong_type", f"a row is an object with named fields, not {_short(row)}")
    fields = {name: row.get(columns.get(name, name)) for name in FIELDS}
    chosen, rejected = (_turns(name, _required(name, fields)) for name in ("chosen", "rejected"))
    prompt = None if fields["prompt"] is None else _turns("prompt", fields["prompt"])
    system = fields["system"]
    if system is not None and not isinstance(system, str):
        raise BadRow("wrong_type", f"system is text, not {_short(system)}")
    tools, template_kwargs = _parsed("tools", fields, list), _parsed("chat_template_kwargs", fields, dict)

    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type", "one of chosen and rejected is text, the other messages")
    if chosen == rejected:
        raise BadRow("equal_responses", _short(chosen))
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if tools or template_kwargs:
            raise BadRow("wrong_type", "tools and chat_template_kwargs need messages, and this row is text")
        return _text_example(prompt, chosen, rejected, system)
    example = _message_example(prompt, chosen, rejected, system)
    options = {"tools": tools, "chat_template_kwargs": template_kwargs}
    return example | {name: value for name, value in options.items() if value}


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of equal items that both begin with."""
    most = min(len(first), len(second))
    return next((index for index in range(most) if first[index] != second[index]), most)


def _text_example(prompt: str | None, chosen: str, rejected: str, system: str | None) -> dict[str, Any]:
    """Text prompt and the two texts that follow it."""
    if prompt is None:
        cut = _text_prompt_length(chosen, rejected)
        if not chosen[:cut].strip():
            raise BadRow("no_common_prompt", f"chosen begins {_short(chosen)}, rejected {_short(rejected)}")
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if not response.strip():
                raise BadRow("empty_field", f"{name} holds nothing beyond the common prompt")
    if system:
        prompt = f"{system}\n\n{prompt}"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _text_prompt_length(chosen: str, rejected: str) -> int:
    """Characters of the prompt that two whole texts share; 0 where there is none."""
    shared = shared_length(chosen, rejected)
    turn = chosen.rfind(HH_TURN, 0, shared)
    if turn >= 0:
        return turn + len(HH_TURN)
    if shared < len(chosen) and shared < len(rejected) and chosen[shared].isspace() and rejected[shared].isspace():
        return shared
    # Cut inside a word, generation would start where no tokenizer starts: go back to before the last space (it
    # belongs to the word that follows) or to after the last line end.
    while shared > 0 and not chosen[shared - 1].isspace():
        shared -= 1
    while shared > 0 and chosen[shared - 1].isspace() and chosen[shared - 1] != "\n":
        shared -= 1
    return shared


def _message_example(prompt: Turns | None, chosen: Turns, rejected: Turns, system: str | None) -> dict[str, Any]:
    """Messages of the prompt and the messages of the two responses."""
    chosen, rejected = _as_messages(chosen, "assistant"), _as_messages(rejected, "assistant")
    if prompt is None or (isinstance(prompt, str) and chosen[0]["role"] != "assistant"):
        shared = shared_length(chosen[:-1], rejected[:-1])  # each keeps a message to respond with
        if shared == 0:
            raise BadRow("no_common_prompt", f"chosen begins {_short(chosen[0])}, rejected {_short(rejected[0])}")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt = _as_messages(prompt, "user")
        if _repeats(prompt, chosen) and _repeats(prompt, rejected):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        last = response[-1]
        if last["role"] != "assistant":
            raise BadRow("not_by_assistant", f"{name} ends with a message by {_short(last['role'])}")
        if not last.get("tool_calls") and not str(last.get("content", "")).strip():
            raise BadRow("empty_field", f"the last message of {name} has no content")
    if system and prompt[0]["role"] not in ("system", "developer"):
        prompt = [{"role": "system", "content": system}, *prompt]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _repeats(prompt: list[Message], response: list[Message]) -> bool:
    """Whether the response is a whole dialogue that begins with the prompt."""
    return len(response) > len(prompt) and response[: len(prompt)] == prompt


def _as_messages(turns: Turns, role: str) -> list[Message]:
    """Messages as they are; text as one message by `role`."""
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def _required(name: str, fields: Mapping[str, Any]) -> Any:
    """The field's value; BadRow where it is missing."""
    if fields[name] is None:
        raise BadRow("missing_field", f"{name} is missing")
    return fields[name]


def _turns(name: str, value: Any) -> Turns:
    """A field as text or as checked messages; BadRow where it is neither, or empty."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (str, list)):
        raise BadRow("wrong_type", f"{name} is text or a list of {{role, content}}, not {_short(value)}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise BadRow("empty_field", f"{name} is empty")
    return value if isinstance(value, str) else [_message(name, message) for message in value]


def _message(name: str, message: Any) -> Message:
    """The message without its null fields; BadRow unless it has a role and content or tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow("wrong_type", f"{name} holds {_short(message)}; a message has a role and content")
    content = message.get("content")
    if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
        raise BadRow("wrong_type", f"{name} has a message whose content is {_short(content)}, not text")
    return {key: value for key, value in message.items() if value is not None}


def _parsed(name: str, fields: Mapping[str, Any], wanted: type) -> Any:
    """A list or object field, given as such or as JSON text; None where there is none."""
    value = fields[name]
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("wrong_type", f"{name} is text but not JSON: {error}") from error
    if value in (None, ""):
        return None
    if not isinstance(value, wanted):
        raise BadRow("wrong_type", f"{name} is a JSON {wanted.__name__}, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    """The value's type and beginning, for a message."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
