"""One row of a file to examples: a prompt and the responses to it, as text or as messages.

Which layouts are understood stands in `formats`, how one field is read in `messages`. Here a row's parts become one
whole in which the prompt stands once:

- *text*: all fields are strings. It stays text, also where the model has a chat template, unless `data.text` is chat:
  then prompt and responses become messages, and a dialogue in the form of Anthropic HH its turns.
- *messages*: a prompt of one form with responses of the other becomes messages: a string prompt is a user message, a
  string response an assistant message.
- An implicit prompt (no prompt field, or a string prompt beside whole dialogues) is what the dialogues share from
  the start: for messages, whole messages; for text with "\\n\\nAssistant:" in the shared part, up to and including its
  last occurrence (Anthropic HH); for other text, cut back to the end of a word or line.
- A response that repeats an explicit prompt, up to outer spaces and a system message, has it removed. One that begins
  with another turn than the assistant's and does not repeat the prompt is a bad row.
- A prompt that ends with an assistant message is a begun answer, which the responses continue.
- `system` becomes a system message where the prompt has none; before a text prompt it stands as a paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsdpo.config.data import NOT_OF_TEMPLATES
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.formats import NUMBERS, RowRules, other_prompt_field, pairs_of, read_fields
from dsdpo.data.messages import Message, Turns, as_messages, read_json, read_turns, short, text_of

HH_TURN = "\n\nAssistant:"
HH_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SYSTEM = ("system", "developer")
# A shorter text prompt may begin a response by chance ("Hello"), so it does not count as repeated.
REPEATED_PROMPT = 20


def to_example(row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's first pair, see `to_examples`. `columns` maps our field names to the row's."""
    return to_examples(row, RowRules(columns))[0]


def to_examples(row: Any, rules: RowRules) -> list[dict[str, Any]]:
    """The row's pairs, one unless it holds n scored completions, each {prompt, chosen, rejected} of one form; or one
    {prompt, responses, scores} where it holds one rated completion, or a list that is to stay one.

    Besides they have tools, chat_template_kwargs, margin, weight and confidence where the row has them. Raises BadRow.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("wrong_type", f"a row is an object with named fields, not {short(row)}")
    return [
        _group(row, fields, rules) if "responses" in fields else _example(row, fields, rules)
        for fields in pairs_of(row, read_fields(row, rules), rules)
    ]


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of equal items that both begin with."""
    most = min(len(first), len(second))
    return next((index for index in range(most) if first[index] != second[index]), most)


def _group(row: dict[str, Any], fields: dict[str, Any], rules: RowRules) -> dict[str, Any]:
    """One prompt with its n responses: what holds for pairs holds for the first response and each of the others."""
    first, *others = [read_turns("completion", response) for response in fields["responses"]]
    pairs = [_example(row, fields | {"chosen": first, "rejected": other}, rules) for other in others or [_other(first)]]
    if any(pair["prompt"] != pairs[0]["prompt"] for pair in pairs):
        raise BadRow("prompt_mismatch", "the completions begin with different prompts")
    responses = [pairs[0]["chosen"], *(pair["rejected"] for pair in pairs if others)]
    rest = {name: value for name, value in pairs[0].items() if name not in ("chosen", "rejected", "margin")}
    return rest | {"responses": responses, "scores": fields["values"]}


def _other(response: Turns) -> Turns:
    """A response of the same form with another end, beside which a single one is read as one of a pair."""
    if isinstance(response, str):
        return response + "."
    return [*response[:-1], response[-1] | {"content": text_of(response[-1]) + "."}]


def _example(row: dict[str, Any], fields: dict[str, Any], rules: RowRules) -> dict[str, Any]:
    """One pair of the row."""
    chosen, rejected = (read_turns(name, fields[name]) for name in ("chosen", "rejected"))
    prompt = None if fields["prompt"] is None else read_turns("prompt", fields["prompt"])
    system, history = _system(fields["system"]), fields["history"]
    tools = read_json("tools", fields["tools"], list)
    template_kwargs = read_json("chat_template_kwargs", fields["chat_template_kwargs"], dict)
    if taken := next((name for name in template_kwargs or () if name in NOT_OF_TEMPLATES), None):
        raise BadRow("wrong_type", f"chat_template_kwargs holds {taken}, which is no variable of a template")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type", "one of chosen and rejected is text, the other messages")
    if chosen == rejected:
        raise BadRow("equal_responses", short(chosen))
    options: dict[str, Any] = {name: fields[name] for name in NUMBERS if fields[name] is not None}
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list) and not history:
        other = other_prompt_field(row, rules) if prompt is None and HH_TURN not in chosen else None
        if other:
            raise BadRow(
                "no_common_prompt", f"no prompt, but a field {other}: map it with columns: {{prompt: {other}}}"
            )
        if not rules.text_as_chat:
            if tools or template_kwargs:
                raise BadRow("wrong_type", "tools and chat_template_kwargs need messages, and this row is text")
            return _text_example(prompt, chosen, rejected, system) | options
        split = _text_example(prompt, chosen, rejected, None)
        prompt, chosen, rejected = _text_turns(split)
    example = _message_example(prompt, chosen, rejected, system, history)
    options |= {"tools": tools, "chat_template_kwargs": {**rules.chat_template_kwargs, **(template_kwargs or {})}}
    return example | {name: value for name, value in options.items() if value or name in NUMBERS}


def _system(value: Any) -> str | None:
    """The text of a row's own field for the system message, which may hold it as parts or as one message."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    turns = read_turns("system", value)
    if isinstance(turns, str):
        return turns
    if len(turns) != 1 or turns[0]["role"] not in SYSTEM:
        raise BadRow("wrong_type", f"system is text or one system message, not {short(value)}")
    return text_of(turns[0])


def _text_example(prompt: str | None, chosen: str, rejected: str, system: str | None) -> dict[str, Any]:
    """Text prompt and the two texts that follow it."""
    if prompt is None:
        cut = _text_prompt_length(chosen, rejected)
        if not chosen[:cut].strip():
            raise BadRow("no_common_prompt", f"chosen begins {short(chosen)}, rejected {short(rejected)}")
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if not response.strip():
                raise BadRow("empty_field", f"{name} holds nothing beyond the common prompt")
    else:
        chosen, rejected = _without_text_prompt(prompt, chosen, rejected)
    if system:
        prompt = f"{system}\n\n{prompt}"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _without_text_prompt(prompt: str, chosen: str, rejected: str) -> tuple[str, str]:
    """The responses, without the prompt where both repeat it. Raises BadRow where only one does."""
    known = prompt.strip()
    if len(known) < REPEATED_PROMPT and "\n" not in known and not known.endswith((":", "=", "->", "=>")):
        return chosen, rejected
    repeats = [response.lstrip().startswith(known) for response in (chosen, rejected)]
    if not any(repeats):
        return chosen, rejected
    if not all(repeats):
        one = "chosen" if repeats[0] else "rejected"
        raise BadRow("prompt_mismatch", f"{one} repeats the whole prompt, the other does not: {short(prompt)}")
    # What the prompt ends with belongs to it, not to the response too.
    tail = prompt[len(prompt.rstrip()) :]
    rests = [response.lstrip()[len(known) :].removeprefix(tail) for response in (chosen, rejected)]
    for name, rest in zip(("chosen", "rejected"), rests, strict=True):
        if not rest.strip():
            raise BadRow("empty_field", f"{name} holds nothing beyond the prompt")
    return rests[0], rests[1]


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


def _text_turns(example: dict[str, str]) -> tuple[list[Message], list[Message], list[Message]]:
    """Text as messages: the turns of an Anthropic HH dialogue, else one of the user and one of the assistant."""
    prompt, responses = example["prompt"], (example["chosen"], example["rejected"])
    if not (prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith(HH_TURN.strip())):
        return (
            [{"role": "user", "content": prompt.strip()}],
            [{"role": "assistant", "content": responses[0].strip()}],
            [{"role": "assistant", "content": responses[1].strip()}],
        )
    turns = _hh_turns("\n\n" + prompt.lstrip())[:-1]  # the last is the answer's empty beginning
    chosen, rejected = (_hh_turns(HH_TURN + response) for response in responses)
    return turns, chosen, rejected


def _hh_turns(text: str) -> list[Message]:
    """The turns of a text in which each begins with an empty line and its speaker."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    return [
        {"role": HH_SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _message_example(
    prompt: Turns | None, chosen: Turns, rejected: Turns, system: str | None, history: list[Message]
) -> dict[str, Any]:
    """Messages of the prompt and the messages of the two responses."""
    responses = [as_messages(chosen, "assistant"), as_messages(rejected, "assistant")]
    whole = [response[0]["role"] not in ("assistant", "tool") for response in responses]
    if prompt is None or (isinstance(prompt, str) and all(whole)):
        turns, responses = _common_beginning(responses)
        if isinstance(prompt, str) and not any(_is_in(message, prompt) for message in turns):
            raise BadRow("prompt_mismatch", f"prompt is {short(prompt)}, but the dialogues begin {short(turns[-1])}")
    else:
        turns, responses = _beside(as_messages(prompt, "user"), responses)
    if history:
        lead = 1 if turns[0]["role"] in SYSTEM else 0
        turns = [*turns[:lead], *history, *turns[lead:]]
    for name, response in zip(("chosen", "rejected"), responses, strict=True):
        last = response[-1]
        if last["role"] != "assistant":
            raise BadRow("not_by_assistant", f"{name} ends with a message by {short(last['role'])}")
        if not last.get("tool_calls") and not text_of(last).strip():
            raise BadRow("empty_field", f"the last message of {name} has no content")
    if system and system.strip() and turns[0]["role"] not in SYSTEM:
        turns = [{"role": "system", "content": system}, *turns]
    return {"prompt": turns, "chosen": responses[0], "rejected": responses[1]}


def _common_beginning(dialogues: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """What whole dialogues share, and what each goes on with; a system message may stand in one of them alone."""
    system, bodies = _without_system(dialogues)
    alike = [[_plain(message) for message in body[:-1]] for body in bodies]  # each keeps a message to respond with
    shared = shared_length(*alike)
    if shared == 0:
        first, second = (body[0] for body in bodies)
        if first["role"] == second["role"] == "assistant":
            raise BadRow("no_common_prompt", "the responses hold answers alone, and the row has no field named prompt")
        raise BadRow("no_common_prompt", f"chosen begins {short(first)}, rejected {short(second)}")
    return system + bodies[0][:shared], [body[shared:] for body in bodies]


def _beside(prompt: list[Message], responses: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The prompt once and each response without it. Raises BadRow for dialogues that do not repeat it."""
    rests, systems = [], [prompt[:1]] if prompt[0]["role"] in SYSTEM else []
    body = prompt[len(systems) :]
    known = [_plain(message) for message in body]
    for name, response in zip(("chosen", "rejected"), responses, strict=True):
        own = response[:1] if response[0]["role"] in SYSTEM else []
        rest = response[len(own) :]
        if body and len(rest) > len(body) and [_plain(message) for message in rest[: len(body)]] == known:
            rests.append(rest[len(body) :])
        elif not own and _follows(prompt, rest):
            rests.append(_continued(prompt, rest))
        else:
            return _end_of_dialogues(name, prompt, responses)
        if own:
            systems.append(own)
    if len({text_of(system[0]).strip() for system in systems}) > 1:
        raise BadRow("prompt_mismatch", "prompt and responses have different system messages")
    return (systems[0] if systems else []) + body, rests


def _follows(prompt: list[Message], response: list[Message]) -> bool:
    """Whether a response may stand behind the prompt as it is."""
    match response[0]["role"]:
        case "assistant":
            return True
        case "tool":
            return bool(prompt[-1].get("tool_calls"))
        case role:
            return role == "user" and prompt[-1]["role"] == "assistant" and len(response) > 1


def _end_of_dialogues(
    name: str, prompt: list[Message], dialogues: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """What the dialogues share, if the prompt is the end of it, e.g. the last question alone. Raises BadRow if not."""
    shown = short([message["role"] for message in dialogues[name == "rejected"]])
    wrong = BadRow("prompt_mismatch", f"{name} is a dialogue that does not begin with the prompt (its roles: {shown})")
    if any(dialogue[0]["role"] == "assistant" for dialogue in dialogues):
        raise wrong
    try:
        shared, rests = _common_beginning(dialogues)
    except BadRow:
        raise wrong from None
    system = prompt[:1] if prompt[0]["role"] in SYSTEM else []
    body = [_plain(message) for message in prompt[len(system) :]]
    if not body or [_plain(message) for message in shared[-len(body) :]] != body:
        raise wrong
    own = shared[:1] if shared[0]["role"] in SYSTEM else []
    if system and own and text_of(system[0]).strip() != text_of(own[0]).strip():
        raise BadRow("prompt_mismatch", "prompt and responses have different system messages")
    return (shared if own else system + shared), rests


def _continued(prompt: list[Message], response: list[Message]) -> list[Message]:
    """The response without the answer that the prompt has begun, where it repeats that."""
    begun = text_of(prompt[-1])
    if prompt[-1]["role"] != "assistant" or response[0]["role"] != "assistant" or not begun.strip():
        return response
    content = text_of(response[0])
    if not content.lstrip().startswith(begun.strip()):
        return response
    rest = content.lstrip()[len(begun.strip()) :].removeprefix(begun[len(begun.rstrip()) :])
    return [response[0] | {"content": rest}, *response[1:]]


def _without_system(dialogues: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The system message that the dialogues begin with, if any, and the dialogues without it."""
    leads = [dialogue[:1] if dialogue[0]["role"] in SYSTEM else [] for dialogue in dialogues]
    found = [lead for lead in leads if lead]
    if len({text_of(lead[0]).strip() for lead in found}) > 1:
        raise BadRow("no_common_prompt", f"the system messages differ: {short(text_of(found[1][0]))}")
    bodies = [dialogue[len(lead) :] for dialogue, lead in zip(dialogues, leads, strict=True)]
    if not all(bodies):
        raise BadRow("no_common_prompt", "a dialogue holds a system message alone")
    return (found[0] if found else []), bodies


def _plain(message: Message) -> Message:
    """The message for comparison: outer spaces and fields that say nothing to a template are left out."""
    kept = {key: value for key, value in message.items() if key in ("role", "tool_calls", "name", "reasoning_content")}
    return kept | {"content": text_of(message).strip()}


def _is_in(message: Message, prompt: str) -> bool:
    """Whether a message and a text prompt are the same question; the text may be a whole dialogue written out."""
    content = text_of(message).strip()
    return bool(content) and (content in prompt or prompt.strip() in content)
