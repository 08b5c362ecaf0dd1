"""Which tokens of a response of several messages are learned: the assistant's, not those of users and tools.

A template that marks what it generates ({% generation %}) is believed. Otherwise the turns are found by rendering the
dialogue up to each of them: an assistant's turn begins where the text of the messages before it and a generation prompt
ends, and ends where the text of the messages up to it does. Templates that write earlier messages differently once
others follow (thoughts cut, a system message moved) are met by comparing ends, and what was found is checked: an answer
stands in its own turn, a user's message in none. A response of one message is learned whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from jinja2.exceptions import TemplateError

from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.messages import Message, text_of
from dsdpo.data.render import common_length
from dsdpo.data.types import Tokenizer

TrainOn = Literal["all", "assistant", "last"]
Span = tuple[int, int]  # [start, end) in a text
END_TOKEN, END_TOKEN_HERE = re.compile(r"<[^<>\s]+>\s*$"), re.compile(r"<[^<>\s]+>\s*")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Render = Callable[[Sequence[Message], bool], str]  # messages, with a generation prompt or not, to text


def response_mask(
    messages: list[Message],
    first: int,
    text: str,
    ids: list[int],
    *,
    render: Render,
    mark: Callable[[Sequence[Message]], list[int]] | None,
    tokenizer: Tokenizer,
    train_on: TrainOn,
) -> list[bool] | None:
    """Of the tokens `ids` of a response, which are learned; None: all of them.

    The response is `messages[first:]`, and `text`, prompt and response, ends with what `ids` stand for. `mark` gives
    the template's own marks on the tokens of the whole text. Raises BadRow where the turns cannot be found.
    """
    if train_on == "all" or len(messages) - first == 1:
        return None
    try:
        marked = mark(messages) if mark is not None else None
        spans = turn_spans(messages, first, render, end_token=str(tokenizer.eos_token or ""))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRow("unknown_turns", str(error)) from error
    shift = len(text) - len(render(messages, False))
    if spans is None and (marked is None or train_on == "last"):
        raise BadRow("unknown_turns", f"roles: {' '.join(message['role'] for message in messages[first:])}")
    wanted = None
    if spans is not None:
        chosen = spans[-1:] if train_on == "last" else spans
        wanted = span_mask(text, ids, [(start + shift, end + shift) for start, end in chosen], tokenizer)
    if marked is None:
        return wanted
    tail = [bool(one) for one in marked[-len(ids) :]]
    tail = [False] * (len(ids) - len(tail)) + tail
    return tail if train_on == "assistant" or wanted is None else [a and b for a, b in zip(tail, wanted, strict=True)]


def turn_spans(messages: list[Message], first: int, render: Render, *, end_token: str = "") -> list[Span] | None:
    """Where each assistant's message from `first` on stands in the rendered dialogue, without its header; None where
    that cannot be told. `end_token` is what some templates put behind a dialogue, though not behind each turn."""
    whole = render(messages, False)
    spans: list[Span] = []
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        before = render(messages[:index], True) if index else ""
        start = common_length(before, whole)
        end = len(whole)
        if index + 1 < len(messages):
            end = _end_of_turn(whole, start, render(messages[: index + 1], False), end_token)
        spans.append((start, end))
    return spans if spans and _are_turns(whole, spans, messages, first) else None


def _end_of_turn(whole: str, start: int, up_to: str, end_token: str) -> int:
    """Where the turn that begins at `start` ends, given the text of the messages up to it."""
    for text in (up_to, up_to.rstrip().removesuffix(end_token)):
        if end := _end_of_shared(whole, start, text):
            return end
    # Some templates end the last turn with another token than those before it.
    own_end = END_TOKEN.search(up_to)
    end = _end_of_shared(whole, start, up_to[: own_end.start()]) if own_end else 0
    other_end = END_TOKEN_HERE.match(whole, end) if end else None
    return other_end.end() if other_end else start


def _end_of_shared(whole: str, start: int, text: str) -> int:
    """Where in `whole` what `text` ends with ends, which begins at `start`; 0 where it is not there."""
    if whole.startswith(text):
        return len(text)
    overlap = _overlap(whole[start:], text)
    return start + overlap if overlap else 0


def _overlap(text: str, other: str) -> int:
    """Length of the longest beginning of `text` that `other` ends with."""
    return next((size for size in range(min(len(text), len(other)), 0, -1) if other.endswith(text[:size])), 0)


def _are_turns(whole: str, spans: Sequence[Span], messages: Sequence[Message], first: int) -> bool:
    """Whether every answer stands in its own span, and what a user says between two of them in none."""
    at, turns = spans[0][0], iter(spans)
    for message in messages[first:]:
        content = _text(message).rsplit("</think>", 1)[-1].strip()
        if message["role"] == "assistant":
            start, end = next(turns)
            if start < at or end <= start or content not in whole[start:end]:
                return False
            at = end
        elif message["role"] == "user":
            found = whole.find(content, at)
            if found < 0 or any(start < found + len(content) and found < end for start, end in spans):
                return False
    return True


def _text(message: Message) -> str:
    """A message's text, also where it is a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return text_of(message)


def span_mask(text: str, ids: list[int], spans: Sequence[Span], tokenizer: Tokenizer) -> list[bool]:
    """Which of `ids`, the tokens that `text` ends with, begin within one of the spans.

    A few tokens where the response begins may be others than those of the whole text, which merges across the border:
    they go with the first one after them.
    """
    starts = _token_starts(text, ids, tokenizer)
    mask = [any(first <= start < end for first, end in spans) for start in starts]
    return [mask[0] if mask else True] * (len(ids) - len(mask)) + mask


def _token_starts(text: str, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Where in the text the last tokens begin, for as many of `ids` as are tokens of the whole text too."""
    if not getattr(tokenizer, "is_fast", False):
        return _counted_starts(text, ids, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    same = _same_at_end(encoded.input_ids, ids)
    return [start for start, _ in encoded.offset_mapping[len(encoded.input_ids) - same :]]


def _counted_starts(text: str, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The same for a tokenizer that does not tell: each token's length as text, counted from the end."""
    whole = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    starts, end = [], len(text)
    for token in reversed(ids[len(ids) - _same_at_end(whole, ids) :]):
        piece = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found = text.rfind(piece, 0, end) if piece.strip() else end - len(piece)
        end = found if found >= 0 else end - 1
        starts.append(end)
    return starts[::-1]


def _same_at_end(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal items that both end with."""
    most = min(len(first), len(second))
    return next((size for size in range(most) if first[-1 - size] != second[-1 - size]), most)


def has_marks(template: str) -> bool:
    """Whether a template marks what it generates."""
    return GENERATION.search(template) is not None
