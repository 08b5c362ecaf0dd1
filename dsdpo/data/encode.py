"""Examples to token ids, so that a response starts exactly where generation would start.

Messages
  The prompt is rendered by the chat template with the generation prompt, prompt + response is rendered whole.
  1. The prompt's ids begin the ids of all wholes: the responses are the rests.
  2. Only the prompt's text begins their texts (the tokenizer merges across the border): the rest of each text is
     tokenized behind a character that does not merge with it, so that a tokenizer which begins texts with a space of
     its own does not put one there.
  3. Neither, because the template renders the history differently once a response follows: the prompt ends at the
     last token that the prompt and all wholes share. Counted in the report as `rewritten`.
  Ids are taken as the template makes them: no BOS is added, and EOS only where the template ends a response with no
  special token at all and `data.add_eos` is auto. Everything after the prompt is the response, later user turns
  included.
Text
  Rules 1 and 2 on the strings; what the tokenizer puts before plain text (BOS) begins the prompt once, EOS ends each
  response once.
Truncation
  A prompt longer than `max_prompt_length` is cut at its end (keep_start), or at its beginning behind BOS (keep_end).
  Then prompt + response is cut to `max_length` tokens: with keep_end from the beginning of the prompt first, if then
  the longest response fits (else to half of `max_length`); otherwise from the end of the responses. A cut response gets
  no end token. With keep_start a prompt that fills `max_length` alone makes a bad row.

All responses of an example follow the same prompt ids by the same rule, and the ids of prompt + response spell the
text: under 1 and 3 they are the whole's own, under 2 that is checked and 3 taken where it does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date as day
from functools import partial
from typing import Any, Literal

from dsdpo.config.data import DataConfig
from dsdpo.data.assistant_mask import TrainOn, has_marks, response_mask
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.render import Rendered, Renderer, render, response_name
from dsdpo.data.types import Tokenizer

# Characters to put before a text: the first that does not merge with its beginning is taken.
GUARDS = ("\x01", "\n", ".", "a", "1")


@dataclass(frozen=True)
class Encoder:
    """What turns examples into ids."""

    renderer: Renderer
    max_length: int  # tokens of prompt + response
    opening: tuple[int, ...]  # ids that the tokenizer puts before plain text
    end_tokens: tuple[str, ...]  # those that end a generation, the tokenizer's own first
    special_tokens: tuple[str, ...]  # all that a template may end a turn with
    add_eos: Literal["auto", "never"]
    train_on: TrainOn = "assistant"
    max_prompt_length: int | None = None
    truncation: Literal["keep_start", "keep_end"] = "keep_start"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of model and template."""
        return self.renderer.tokenizer

    @property
    def date_used(self) -> str | None:
        """What the template is told, None where it does not ask."""
        return self.renderer.date if self.renderer.asks_for_date else None


@dataclass(frozen=True)
class Encoded:
    """One example as ids, cut to the maximal length."""

    prompt: list[int]
    responses: tuple[list[int], ...]  # each alone, the better first
    truncated: bool  # a response was cut
    notes: tuple[str, ...] = ()  # keys of dropped_rows.NOTES, some with a token behind a space
    learned: tuple[list[bool] | None, ...] = ()  # of each response's tokens; None, or () for all responses: all of them

    @property
    def chosen(self) -> list[int]:
        """The first response of a pair."""
        return self.responses[0]

    @property
    def rejected(self) -> list[int]:
        """The second response of a pair."""
        return self.responses[1]

    @property
    def rewritten(self) -> bool:
        """Whether rule 3 was needed."""
        return "rewritten" in self.notes


def encoder_for(tokenizer: Tokenizer, data: DataConfig) -> Encoder:
    """The encoder of a run's settings."""
    return make_encoder(
        tokenizer,
        max_length=data.max_length,
        add_eos=data.add_eos,
        keep_thoughts=data.keep_thoughts,
        date=data.date,
        train_on=data.train_on,
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
    )


def make_encoder(
    tokenizer: Tokenizer,
    *,
    max_length: int,
    add_eos: Literal["auto", "never"] = "auto",
    keep_thoughts: Literal["drop", "refuse"] = "drop",
    date: str | None = None,
    train_on: TrainOn = "assistant",
    max_prompt_length: int | None = None,
    truncation: Literal["keep_start", "keep_end"] = "keep_start",
) -> Encoder:
    """The encoder for a tokenizer, which must have a chat template if there are messages to encode."""
    marked, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    starts = range(len(marked) - len(bare) + 1)
    start = next((i for i in starts if marked[i : i + len(bare)] == bare), 0)
    own = tokenizer.eos_token
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return Encoder(
        Renderer(tokenizer, keep_thoughts=keep_thoughts, date=date or day.today().isoformat()),
        max_length,
        opening=tuple(marked[:start]),
        end_tokens=tuple(dict.fromkeys((*([str(own)] if own else []), *getattr(tokenizer, "end_tokens", ())))),
        special_tokens=tuple(dict.fromkeys([*map(str, tokenizer.all_special_tokens), *map(str, added)])),
        add_eos=add_eos,
        train_on=train_on,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
    )


def encode_examples(examples: Sequence[dict[str, Any]], encoder: Encoder) -> list[Encoded | BadRow]:
    """Each example's ids, or why it has none."""
    results: list[Encoded | BadRow | None] = []
    rendered: list[Rendered] = []
    for example in examples:
        try:
            rendered.append(render(example, encoder.renderer))
            results.append(None)
        except BadRow as bad:
            results.append(bad)
    good = [index for index, result in enumerate(results) if result is None]
    for index, one, parts in zip(good, rendered, _split_all(rendered, encoder), strict=True):
        try:
            masks = _masks(examples[index], one, parts[1], encoder)
            results[index] = _finished(one, parts, masks, encoder)
        except BadRow as bad:
            results[index] = bad
    return [result for result in results if result is not None]


def encode_prompt(example: dict[str, Any], encoder: Encoder) -> list[int]:
    """The ids of an example's prompt, where generation starts; its responses are only rendered. Raises BadRow."""
    one = render(example, encoder.renderer)
    [prompt] = _ids([one.prompt], encoder)
    prompt = _opened(prompt, encoder) if one.plain else prompt
    return _checked_room(_cut_prompt(prompt, 1, encoder), encoder)


Parts = tuple[list[int], list[list[int]], bool]  # ids of prompt and responses, and whether rule 3 was needed


def _split_all(rendered: list[Rendered], encoder: Encoder) -> list[Parts]:
    """The ids of each example's prompt and responses, by the first rule that holds for all its responses."""
    # One call for all texts: a fast tokenizer works on them in parallel.
    ids = iter(_ids([text for one in rendered for text in (one.prompt, *one.wholes)], encoder))
    prompts, wholes = [], []
    for one in rendered:
        prompts.append(next(ids))
        wholes.append([next(ids) for _ in one.wholes])
    found: list[Parts | None] = [None] * len(rendered)
    merged = []
    for index, (one, prompt) in enumerate(zip(rendered, prompts, strict=True)):
        if all(whole[: len(prompt)] == prompt for whole in wholes[index]):
            found[index] = prompt, [whole[len(prompt) :] for whole in wholes[index]], False
        elif all(text.startswith(one.prompt) for text in one.wholes):
            merged.append(index)
    for index, rests in _guarded(merged, rendered, prompts, wholes, encoder):
        found[index] = prompts[index], rests, False
    return [parts or _shared(prompts[index], wholes[index]) for index, parts in enumerate(found)]


def _shared(prompt: list[int], wholes: list[list[int]]) -> Parts:
    """Rule 3."""
    shared = min(_common(prompt, whole) for whole in wholes)
    return prompt[:shared], [whole[shared:] for whole in wholes], True


def _guarded(
    indices: list[int],
    rendered: list[Rendered],
    prompts: list[list[int]],
    wholes: list[list[list[int]]],
    encoder: Encoder,
) -> list[tuple[int, list[list[int]]]]:
    """Rule 2: the responses' ids of those examples for which some guard serves."""
    done = []
    for guard in GUARDS:
        if not indices:
            break
        mark = _ids([guard], encoder)[0]
        texts = [guard + text[len(rendered[index].prompt) :] for index in indices for text in rendered[index].wholes]
        ids = iter(_ids(texts, encoder))
        left = []
        for index in indices:
            marked = [next(ids) for _ in wholes[index]]
            rests = [one[len(mark) :] for one in marked]
            apart = bool(mark) and all(one[: len(mark)] == mark for one in marked)
            if apart and all(
                _spell_same(prompts[index] + rest, whole, encoder)
                for rest, whole in zip(rests, wholes[index], strict=True)
            ):
                done.append((index, rests))
            else:
                left.append(index)
        indices = left
    return done


def _spell_same(first: list[int], second: list[int], encoder: Encoder) -> bool:
    """Whether two lists of ids stand for the same text."""
    tokenizer = encoder.tokenizer
    # What both begin and end with needs no look: only the few tokens at the border differ.
    start = _common(first, second)
    one, other = first[start:], second[start:]
    end = _common(one[::-1], other[::-1])
    middles = (ids[: len(ids) - end] for ids in (one, other))
    if len({"".join(tokenizer.convert_ids_to_tokens(ids)) for ids in middles}) == 1:
        return True
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return bool(tokenizer.decode(first, **options) == tokenizer.decode(second, **options))


def _common(first: list[int], second: list[int]) -> int:
    """Number of equal ids that both begin with, found by halves: comparing slices takes no time in Python."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def _masks(
    example: dict[str, Any], one: Rendered, responses: list[list[int]], encoder: Encoder
) -> list[list[bool] | None]:
    """Which tokens of each response are learned, None: all. Raises BadRow where that cannot be told."""
    if one.plain or encoder.train_on == "all":
        return [None] * len(responses)
    renderer, tokenizer = encoder.renderer, encoder.tokenizer
    marks = None
    if getattr(tokenizer, "is_fast", False) and has_marks(str(tokenizer.get_chat_template(None, example.get("tools")))):
        marks = partial(renderer.marks, example=example)
    return [
        response_mask(
            messages,
            first,
            whole,
            ids,
            render=lambda turns, prompting: renderer(turns, example, generation_prompt=prompting),
            mark=marks,
            tokenizer=tokenizer,
            train_on=encoder.train_on,
        )
        for (messages, first), whole, ids in zip(one.dialogues, one.wholes, responses, strict=True)
    ]


def _finished(one: Rendered, parts: Parts, masks: list[list[bool] | None], encoder: Encoder) -> Encoded:
    """The example with its ends, cut to length. Raises BadRow where nothing is left to train on."""
    prompt, responses, rewritten = parts
    notes = [*one.notes, *(["rewritten"] if rewritten else [])]
    for index, response in enumerate(responses):
        if not response:
            raise BadRow("empty_response", f"{response_name(index)} has no tokens of its own")
    if one.plain:
        notes += ["text_rows"] if encoder.tokenizer.chat_template is not None else []
        prompt = _opened(prompt, encoder)
    end = encoder.tokenizer.eos_token_id
    for index, whole in enumerate(one.wholes):
        note, add = _end(whole, responses[index], one.plain, encoder)
        notes += note
        responses[index] = [*responses[index], end] if add else responses[index]
        if (mask := masks[index]) is not None and add:
            masks[index] = [*mask, True]
    if not prompt:
        raise BadRow("empty_prompt", "prompt and responses share no first token")
    whole_prompt, prompt = prompt, _cut_prompt(prompt, max(map(len, responses)), encoder)
    _checked_room(prompt, encoder)
    if len(prompt) < len(whole_prompt):
        notes.append("prompt_cut")
    room = encoder.max_length - len(prompt)
    several = len(responses) > 1
    if several and all(response == responses[0] for response in responses[1:]):
        raise BadRow("equal_responses", "chosen and rejected have the same tokens")
    if several and all(response[:room] == responses[0][:room] for response in responses[1:]):
        raise BadRow("equal_after_truncation", f"the first {room} tokens of both responses are the same")
    truncated = max(map(len, responses)) > room
    learned = tuple(None if mask is None or all(mask[:room]) else mask[:room] for mask in masks)
    for index, mask in enumerate(learned):
        if mask is not None and not any(mask):
            raise BadRow(
                "nothing_learned", f"{response_name(index)} has no token of the assistant within data.max_length"
            )
    if any(mask is not None for mask in learned):
        notes.append("turns_masked")
    return Encoded(
        prompt,
        tuple(response[:room] for response in responses),
        truncated,
        tuple(dict.fromkeys(notes)),
        learned if any(mask is not None for mask in learned) else (),
    )


def _opened(prompt: list[int], encoder: Encoder) -> list[int]:
    """The ids of plain text behind what the tokenizer puts before it."""
    begins = tuple(prompt[: len(encoder.opening)]) == encoder.opening
    return prompt if begins else [*encoder.opening, *prompt]


def _checked_room(prompt: list[int], encoder: Encoder) -> list[int]:
    """The prompt. Raises BadRow where it leaves no room for a response, or has no tokens."""
    if len(prompt) >= encoder.max_length:
        raise BadRow("prompt_too_long", f"the prompt has {len(prompt)} tokens, data.max_length is {encoder.max_length}")
    if not prompt:
        raise BadRow("empty_prompt", "the prompt has no tokens")
    return prompt


def _cut_prompt(prompt: list[int], longest_response: int, encoder: Encoder) -> list[int]:
    """The prompt without what is too long of it."""
    limit = encoder.max_prompt_length or len(prompt)
    if encoder.truncation == "keep_start":
        return prompt[:limit]
    room = encoder.max_length - longest_response
    limit = min(limit, room if room > 0 else max(1, encoder.max_length // 2))
    if len(prompt) <= limit:
        return prompt
    opening = prompt[:1] if prompt[0] == encoder.tokenizer.bos_token_id and limit > 1 else []
    return [*opening, *prompt[len(prompt) - limit + len(opening) :]]


def _end(whole: str, response: list[int], plain: bool, encoder: Encoder) -> tuple[list[str], bool]:
    """Notes on how a response ends, and whether the end token is to be added."""
    end, auto = encoder.tokenizer.eos_token_id, encoder.add_eos == "auto"
    if plain:
        missing = end is not None and response[-1] != end
        return (["no_end"] if missing and not auto else []), missing and auto
    text = whole.rstrip()
    if text.endswith(encoder.end_tokens):
        return [], False
    other = next((token for token in encoder.special_tokens if text.endswith(token)), None)
    if other is not None:
        return [f"other_end {other}"], False
    if auto and end is not None:
        return [f"end_added {encoder.end_tokens[0]}"], True
    return ["no_end"], False


def _ids(texts: list[str], encoder: Encoder) -> list[list[int]]:
    """Each text's ids, without anything added."""
    if not texts:
        return []
    # verbose=False: no warning for texts beyond the tokenizer's model_max_length, which are cut later.
    ids: list[list[int]] = encoder.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return ids
