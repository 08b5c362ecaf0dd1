"""Examples of messages to text by the chat template, and the check that the template left nothing of them out.

The prompt is rendered with the generation prompt, prompt + response is rendered whole. Since templates differ, some
things are tried, and the first that loses nothing is taken: arguments of tool calls as an object and as JSON text, an
absent content as "" and null, and contents as lists of parts where nothing else serves.

A template may cut thoughts (`<think>...</think>`) on purpose, from earlier turns or from all: one that speaks of
thoughts at all is taken to. `data.keep_thoughts` says whether such a response is used without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.messages import THOUGHT_FIELDS, Message, short, text_of
from dsdpo.data.types import Tokenizer

THOUGHT_MARKS = re.compile(r"</?think>")
RESPONSES = ("chosen", "rejected")
# Put before a template that asks for the date: transformers hands no function to a template, so the answers are looked
# up. The empty expression keeps what follows as it is, whatever white space that begins with.
FIXED_DATE = "{% macro strftime_now(form) %}{{ fixed_dates[form] }}{% endmacro %}{{ '' }}"
DATE_FORM = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Rendered:
    """One example as text."""

    prompt: str
    wholes: tuple[str, ...]  # prompt and response, for each response
    plain: bool  # no chat template: BOS and EOS are ours to add
    notes: tuple[str, ...] = ()  # keys of dropped_rows.NOTES
    dialogues: tuple[tuple[list[Message], int], ...] = ()  # messages as they were rendered, and how many are the prompt


@dataclass(frozen=True)
class Renderer:
    """A chat template with what it is given besides messages."""

    tokenizer: Tokenizer
    keep_thoughts: Literal["drop", "refuse"] = "drop"
    date: str | None = None  # YYYY-MM-DD, what a template that asks for the date is told; None: the day of the call

    @property
    def knows_thoughts(self) -> bool:
        """Whether the template does anything about thoughts."""
        template = str(self.tokenizer.chat_template)
        return "</think>" in template or any(name in template for name in THOUGHT_FIELDS[:1])

    @property
    def asks_for_date(self) -> bool:
        """Whether the template may write the date."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def __call__(self, messages: Sequence[Message], example: dict[str, Any], *, generation_prompt: bool) -> str:
        """The messages as text."""
        options = {**self._given(example), "tokenize": False, "add_generation_prompt": generation_prompt}
        return str(self.tokenizer.apply_chat_template(list(messages), **options))

    def marks(self, messages: Sequence[Message], example: dict[str, Any]) -> list[int]:
        """Of each token of the rendered messages, 1 where the template says that the assistant generates it."""
        options = {**self._given(example), "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        return list(self.tokenizer.apply_chat_template(list(messages), **options)["assistant_masks"])

    def _given(self, example: dict[str, Any]) -> dict[str, Any]:
        """What the template is given for an example besides messages."""
        tools = example.get("tools")
        options = {**example.get("chat_template_kwargs", {}), "tools": tools}
        if self.date is not None and self.asks_for_date:
            template = self.tokenizer.get_chat_template(None, tools)
            options |= {"chat_template": FIXED_DATE + template, "fixed_dates": dates(template, self.date)}
        return options


def dates(template: str, date: str) -> dict[str, str]:
    """What each date that the template asks for is on a day given as YYYY-MM-DD."""
    day = datetime.fromisoformat(date)
    return {form: day.strftime(form) for _, form in DATE_FORM.findall(template)}


def render(example: dict[str, Any], renderer: Renderer) -> Rendered:
    """The example's texts. Raises BadRow where the chat template refuses it, or leaves something of it out."""
    prompt, responses = example["prompt"], responses_of(example)
    if isinstance(prompt, str):
        return Rendered(prompt, tuple(prompt + response for response in responses), plain=True)
    first: BadRow | None = None
    for variant in _variants([prompt, *responses]):
        try:
            rendered = _rendered(variant[0], variant[1:], example, renderer)
            notes = _missing(rendered, variant[0], variant[1:], example.get("tools"), renderer)
            if not _keeps_prompt(rendered, variant[0]):
                rendered = _behind_prompt(rendered, variant[0])
                notes = (*notes, "prompt_rewritten")
            dialogues = tuple(_dialogue(variant[0], response) for response in variant[1:])
            return Rendered(rendered.prompt, rendered.wholes, plain=False, notes=notes, dialogues=dialogues)
        except BadRow as bad:
            first = first or bad
    assert first is not None
    raise first


def responses_of(example: dict[str, Any]) -> list[Any]:
    """All responses of an example, the better first."""
    return list(example["responses"]) if "responses" in example else [example[name] for name in RESPONSES]


def response_name(index: int) -> str:
    """What a response is called in messages."""
    return RESPONSES[index] if index < len(RESPONSES) else f"response {index + 1}"


def _rendered(
    prompt: list[Message], responses: list[list[Message]], example: dict[str, Any], renderer: Renderer
) -> Rendered:
    """The texts as the template makes them."""
    answers = all(response[0]["role"] == "assistant" for response in responses)
    begun = answers and prompt[-1]["role"] == "assistant"
    try:
        if begun:
            return _continued(prompt, responses, example, renderer)
        return Rendered(
            renderer(prompt, example, generation_prompt=answers),
            tuple(renderer(prompt + response, example, generation_prompt=False) for response in responses),
            plain=False,
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # Templates refuse by raise_exception (a TemplateError), or trip over a field that is not as they expect.
        roles = " ".join(message["role"] for message in prompt + responses[0])
        raise BadRow("template_refused", f"{error} (roles: {roles})") from error


def _dialogue(prompt: list[Message], response: list[Message]) -> tuple[list[Message], int]:
    """Prompt and response as one dialogue, and the place of the response's first message in it.

    Where the prompt ends with a begun answer, that and its continuation are one message.
    """
    if prompt[-1]["role"] != "assistant" or response[0]["role"] != "assistant":
        return prompt + response, len(prompt)
    joined = prompt[-1] | response[0] | {"content": _text(prompt[-1]) + _text(response[0])}
    joined = _in_parts(joined) if isinstance(prompt[-1]["content"], list) else joined
    return [*prompt[:-1], joined, *response[1:]], len(prompt) - 1


# Templates refuse by raise_exception (a TemplateError), or trip over a field that is not as they expect; loops that
# never end are an OverflowError of jinja2's sandbox.
TRIPS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def _continued(
    prompt: list[Message], responses: list[list[Message]], example: dict[str, Any], renderer: Renderer
) -> Rendered:
    """The texts where the prompt's last message is the beginning of the answer: one turn, one header, one end."""
    begun = _text(prompt[-1])
    header = renderer(prompt[:-1], example, generation_prompt=True) if prompt[:-1] else ""
    wholes, prompts = [], []
    for response in responses:
        whole = renderer(_dialogue(prompt, response)[0], example, generation_prompt=False)
        at = whole.find(begun.lstrip(), common_length(header, whole))
        if at < 0:
            raise BadRow("template_drops", f"the answer that the prompt begins: {short(begun)}")
        wholes.append(whole)
        prompts.append(whole[: at + len(begun.lstrip())])
    if len(set(prompts)) > 1:
        raise BadRow("template_refused", "the template writes the answer that the prompt begins in two ways")
    return Rendered(prompts[0], tuple(wholes), plain=False)


def common_length(first: str, second: str) -> int:
    """Number of equal characters that both begin with."""
    if second.startswith(first):
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _variants(parts: list[list[Message]]) -> Iterator[list[list[Message]]]:
    """The messages as they are; with tool calls, each way of writing them that templates expect."""
    if not any(message.get("tool_calls") for messages in parts for message in messages):
        yield parts
    else:
        for as_text in (False, True):
            for absent in ("", None):
                yield [[_variant(message, as_text, absent) for message in messages] for messages in parts]
    yield [[_in_parts(message) for message in messages] for messages in parts]


def _in_parts(message: Message) -> Message:
    """The message with its content as a list of parts, as templates of models that see expect it."""
    return message | {"content": [{"type": "text", "text": text_of(message)}]}


def _variant(message: Message, as_text: bool, absent: str | None) -> Message:
    """A message with tool calls, their arguments as text or not, and an absent content as given."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    if as_text:
        calls = [
            call | {"function": call["function"] | {"arguments": _json_text(call["function"]["arguments"])}}
            for call in calls
        ]
    return message | {"content": message.get("content", absent), "tool_calls": calls}


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(message: Message) -> str:
    """The message's text, also where it stands in a part."""
    content = message.get("content")
    return content[0]["text"] if isinstance(content, list) else text_of(message)


def _keeps_prompt(rendered: Rendered, prompt: list[Message]) -> bool:
    """Whether all of the prompt stands in what its text shares with the wholes, if not in the same words."""
    shared = min(common_length(rendered.prompt, whole) for whole in rendered.wholes)
    if shared == len(rendered.prompt):
        return True
    kept = rendered.prompt[:shared]
    contents = [THOUGHT_MARKS.split(_text(message))[-1].strip() for message in prompt]
    return all(content in kept or content not in rendered.prompt for content in contents)


def _behind_prompt(rendered: Rendered, prompt: list[Message]) -> Rendered:
    """The responses behind the prompt as generation sees it, where the template leaves a part of it out afterwards.

    Some templates write the system message before the last message alone, and only if that is the user's. Raises
    BadRow where the response does not begin behind the prompt's last message and the generation prompt.
    """
    last = _text(prompt[-1]).strip()
    at = rendered.prompt.rfind(last) if last else -1
    wholes = []
    for whole in rendered.wholes:
        end = rendered.prompt[at:]
        start = whole.find(end) if at >= 0 else -1
        if start < 0:
            raise BadRow("template_drops", "a part of the prompt, once a response follows")
        wholes.append(rendered.prompt + whole[start + len(end) :])
    return Rendered(rendered.prompt, tuple(wholes), plain=False)


def _missing(
    rendered: Rendered, prompt: list[Message], responses: list[list[Message]], tools: Any, renderer: Renderer
) -> tuple[str, ...]:
    """Notes on what was left out on purpose. Raises BadRow where anything else was."""
    notes: list[str] = []
    if any("{'type': 'text'" in whole for whole in rendered.wholes):
        raise BadRow("template_drops", "the contents, which it prints as Python")
    for tool in tools or ():
        name = _tool_name(tool)
        if name and name not in rendered.prompt:
            raise BadRow("template_drops", f"the tool {name}")
    begun = prompt[-1]["role"] == "assistant" and responses[0][0]["role"] == "assistant"
    for message in prompt[:-1] if begun else prompt:
        if _check_message(message, "prompt", rendered.prompt, rendered.prompt, "", renderer):
            notes.append("thoughts_cut_before")
    for index, (response, whole) in enumerate(zip(responses, rendered.wholes, strict=True)):
        name = response_name(index)
        start = common_length(rendered.prompt, whole)
        for message in response:
            if _check_message(message, name, whole[start:], whole, rendered.prompt, renderer):
                if renderer.keep_thoughts == "refuse":
                    raise BadRow("template_drops", f"the thoughts of {name}, and data.keep_thoughts is refuse")
                notes.append("thoughts_cut")
    return tuple(dict.fromkeys(notes))


def _check_message(message: Message, name: str, tail: str, whole: str, before: str, renderer: Renderer) -> bool:
    """Whether thoughts of the message were cut on purpose. Raises BadRow where anything else of it is not in the text.

    `tail` is where it should stand; where the generation prompt has its beginning, it stands once more in `whole` than
    in `before`.
    """

    def stands(text: str) -> bool:
        text = text.strip()
        return not text or text in tail or whole.count(text) > before.count(text)

    content, cut = _text(message), False
    if not stands(content) and not (message["role"] == "tool" and any(map(stands, _json_forms(content)))):
        pieces = THOUGHT_MARKS.split(content)
        *thoughts, rest = pieces if len(pieces) > 1 else [content]
        lost = [piece for piece in thoughts if not stands(piece)]
        if not stands(rest) or (lost and not renderer.knows_thoughts):
            raise BadRow("template_drops", f"the content of {name} ({message['role']}): {short(content)}")
        cut = bool(lost)
    for field in THOUGHT_FIELDS:
        thought = message.get(field)
        if isinstance(thought, str) and not stands(thought):
            if not renderer.knows_thoughts:
                raise BadRow("template_drops", f"{field} of {name}: {short(thought)}")
            cut = True
    for call in message.get("tool_calls") or ():
        _check_call(call["function"], name, stands)
    return cut


def _check_call(function: dict[str, Any], name: str, stands: Any) -> None:
    """Raises BadRow unless a called function and its arguments stand in the text, and not as Python."""
    arguments = function["arguments"]
    if not stands(function["name"]):
        raise BadRow("template_drops", f"the call of {function['name']} in {name}")
    if isinstance(arguments, dict) and arguments:
        if stands(str(arguments)) and not any(map(stands, _json_forms(arguments))):
            raise BadRow("template_drops", f"the arguments of {function['name']} in {name}, which it prints as Python")
    elif isinstance(arguments, str) and stands(json.dumps(arguments)) and arguments.startswith("{"):
        raise BadRow("template_drops", f"the arguments of {function['name']} in {name}, which it quotes twice")
    for text in _leaves(arguments if not isinstance(arguments, str) else _loaded(arguments)):
        if not any(map(stands, (text, *_json_forms(text)))):
            raise BadRow("template_drops", f"an argument of {function['name']} in {name}: {short(text)}")


def _leaves(value: Any) -> Iterator[str]:
    """All strings in arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json_forms(value: Any) -> tuple[str, ...]:
    """A value as templates write JSON; a string without its quotes."""
    forms = (json.dumps(value, ensure_ascii=False), json.dumps(value), json.dumps(value, separators=(",", ":")))
    return tuple(form[1:-1] for form in forms) if isinstance(value, str) else forms


def _tool_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
