"""One field of a row as text or as a list of chat messages, whatever form it was written in.

Understood: text; a list of {role, content}; a list of {from, value}; one such message; any of them as JSON text (or as
the Python text that pandas writes). A content may be a list of text parts, which are joined. Tool calls come out as
{"type": "function", "function": {"name", "arguments"}} with arguments as an object where they are one.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from dsdpo.data.dropped_rows import BadRow

Message = dict[str, Any]
Turns = str | list[Message]

PART_KINDS = ("text", "input_text", "output_text", "image", "image_url", "input_image", "audio", "input_audio", "video")
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")

# Names of speakers in {from, value} data and in sets made for other models.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
MESSAGE_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


def read_turns(name: str, value: Any) -> Turns:
    """A field as text or as checked messages. Raises BadRow where it is neither, empty, or holds more than text."""
    if isinstance(value, str):
        value = _parsed_parts(_parsed_messages(name, value))
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(item, dict) and "type" in item for item in value):
        value = _joined_parts(name, value)
    if not isinstance(value, (str, list)):
        raise BadRow("wrong_type", f"{name} is text or a list of {{role, content}}, not {short(value)}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise BadRow("empty_field", f"{name} is empty")
    return value if isinstance(value, str) else [_message(name, message) for message in value]


def as_messages(turns: Turns, role: str) -> list[Message]:
    """Messages as they are; text as one message by `role`."""
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def text_of(message: Message) -> str:
    """The message's text, empty where it has none."""
    return str(message.get("content") or "")


def read_json(name: str, value: Any, wanted: type) -> Any:
    """A list or object, given as such or as JSON text; None where there is none. Raises BadRow for anything else."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("wrong_type", f"{name} is text but not JSON: {error}") from error
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, wanted):
        raise BadRow("wrong_type", f"{name} is a JSON {wanted.__name__}, not {short(value)}")
    return value


def short(value: Any) -> str:
    """The value's type and beginning, for a message."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _parsed_messages(name: str, text: str) -> Any:
    """The messages that a text writes as JSON or Python; any other text as it is."""
    if not text.lstrip().startswith(("[{", "[ {", "[\n", '{"', "{'")):
        return text
    names = ("role", "content", "from", "value", "tool_calls")
    keys = {name for name in names if f'"{name}"' in text or f"'{name}'" in text}
    if not any(wanted <= keys for wanted in MESSAGE_KEYS):
        return text
    parsed: Any = None
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(text.strip())
            break
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    items = parsed if isinstance(parsed, list) else [parsed]
    if items and all(isinstance(item, dict) and any(wanted <= set(item) for wanted in MESSAGE_KEYS) for item in items):
        return items
    if parsed is not None:
        return text
    raise BadRow(
        "wrong_type", f"{name} is the text of a list of messages that is neither JSON nor Python: {short(text)}"
    )


def _parsed_parts(content: Any) -> Any:
    """A content that writes a list of parts as JSON or Python text, as that list; any other as it is."""
    if not isinstance(content, str) or not content.lstrip().startswith(("[{", "[ {")):
        return content
    for parse in (json.loads, ast.literal_eval):
        try:
            parts = parse(content.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return parts if isinstance(parts, list) and parts and all(map(_is_part, parts)) else content
    return content


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and (part.get("type") in PART_KINDS) and len(part) == 2


def _message(name: str, message: Any) -> Message:
    """The message as {role, content, ...} without null fields. Raises BadRow unless it has content or tool calls."""
    if isinstance(message, dict) and isinstance(message.get("from"), str) and "role" not in message:
        message = _from_value(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow("wrong_type", f"{name} holds {short(message)}; a message has a role and content")
    found = {key: value for key, value in message.items() if value is not None}
    role = found["role"].strip()
    found["role"] = ROLES.get(role.lower(), role)
    content = _parsed_parts(found.get("content"))
    if isinstance(content, list):
        content = found["content"] = _joined_parts(name, content)
    calls = read_json(f"{name}: tool_calls", found.pop("tool_calls", None), list)
    if calls:
        found["tool_calls"] = [_tool_call(name, call) for call in calls]
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRow("wrong_type", f"{name} has a message whose content is {short(content)}, not text")
    return found


def _from_value(message: dict[str, Any]) -> dict[str, Any]:
    """A {from, value} message as {role, content}; a function_call as an assistant's tool call."""
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    value = message.get("value")
    if message["from"] != "function_call" or not isinstance(value, str):
        return {"role": message["from"], "content": value, **others}
    try:
        calls = json.loads(value)
    except ValueError as error:
        raise BadRow("wrong_type", f"a function_call is JSON with name and arguments, not {short(value)}") from error
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **others}


def _joined_parts(name: str, parts: list[Any]) -> str:
    """The text of a content that comes in parts. Raises BadRow for a part that is no text."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
            if not isinstance(part.get("text"), str):
                raise BadRow("wrong_type", f"{name} has a part of type text without text: {short(part)}")
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRow("not_text", f"{name} holds a part of type {kind}; models of text alone are trained here")
    return "".join(texts)


def _tool_call(name: str, call: Any) -> dict[str, Any]:
    """The call with its function under "function" and arguments as an object where they are JSON text of one."""
    if not isinstance(call, dict):
        raise BadRow("wrong_type", f"{name} has a tool call that is {short(call)}")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong_type", f"{name} has a tool call without the function's name: {short(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    outer = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}
