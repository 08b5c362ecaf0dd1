"""Examples to token ids, so that a response starts exactly where generation would start.

Messages
  The prompt is rendered by the chat template with the generation prompt, prompt + response is rendered whole.
  1. The prompt's ids begin the whole's ids: the response is the rest.
  2. Only the prompt's text begins the whole's text (the tokenizer merges across the border): the rest of the text is
     tokenized by itself.
  3. Neither, because the template renders the history differently once a response follows: the prompt ends at the
     last token that prompt, prompt + chosen and prompt + rejected share. Counted in the report as `rewritten`.
  Ids are taken as the template makes them: no BOS and no EOS is added. Everything after the prompt is the response,
  later user turns included.
Text
  Rules 1 and 2 on the strings; what the tokenizer puts before plain text (BOS) begins the prompt once, EOS ends each
  response once.
Truncation
  Prompt + response is cut to `max_length` tokens from the end of the response; the prompt is never cut. A prompt that
  fills `max_length` alone makes a bad row.

Both responses of a pair follow the same prompt ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.examples import shared_length


@dataclass(frozen=True)
class Encoder:
    """What turns examples into ids."""

    tokenizer: Any
    max_length: int  # tokens of prompt + response
    opening: tuple[int, ...]  # ids that the tokenizer puts before plain text


@dataclass(frozen=True)
class Rendered:
    """One example as text."""

    prompt: str
    chosen: str  # prompt and response
    rejected: str  # prompt and response
    plain: bool  # no chat template: BOS and EOS are ours to add


@dataclass(frozen=True)
class Encoded:
    """One example as ids, cut to the maximal length."""

    prompt: list[int]
    chosen: list[int]  # response alone
    rejected: list[int]  # response alone
    truncated: bool  # a response was cut
    rewritten: bool  # rule 3 was needed
    learned: tuple[list[bool] | None, ...] = ()  # of each response's tokens; None, or () for all responses: all of them


def make_encoder(tokenizer: Any, *, max_length: int) -> Encoder:
    """The encoder for a tokenizer, which must have a chat template if there are messages to encode."""
    marked, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    starts = range(len(marked) - len(bare) + 1)
    start = next((i for i in starts if marked[i : i + len(bare)] == bare), 0)
    return Encoder(tokenizer, max_length, tuple(marked[:start]))


def encode_examples(examples: Sequence[dict[str, Any]], encoder: Encoder) -> list[Encoded | BadRow]:
    """Each example's ids, or why it has none."""
    results: list[Encoded | BadRow | None] = []
    rendered: list[Rendered] = []
    for example in examples:
        try:
            rendered.append(_render(example, encoder.tokenizer))
            results.append(None)
        except BadRow as bad:
            results.append(bad)
    # One call for all texts: a fast tokenizer works on them in parallel.
    ids = iter(_ids([text for one in rendered for text in (one.prompt, one.chosen, one.rejected)], encoder))
    for index, one in zip([i for i, result in enumerate(results) if result is None], rendered, strict=True):
        try:
            results[index] = _encode(one, next(ids), next(ids), next(ids), encoder)
        except BadRow as bad:
            results[index] = bad
    return [result for result in results if result is not None]


def _render(example: dict[str, Any], tokenizer: Any) -> Rendered:
    """The example's three texts. Raises BadRow where the chat template refuses it."""
    prompt, chosen, rejected = example["prompt"], example["chosen"], example["rejected"]
    if isinstance(prompt, str):
        return Rendered(prompt, prompt + chosen, prompt + rejected, plain=True)
    options = {**example.get("chat_template_kwargs", {}), "tools": example.get("tools"), "tokenize": False}
    try:
        return Rendered(
            prompt=tokenizer.apply_chat_template(prompt, **{**options, "add_generation_prompt": True}),
            chosen=tokenizer.apply_chat_template(prompt + chosen, **{**options, "add_generation_prompt": False}),
            rejected=tokenizer.apply_chat_template(prompt + rejected, **{**options, "add_generation_prompt": False}),
            plain=False,
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        # Templates refuse by raise_exception (a TemplateError), or trip over a content that is not text.
        roles = " ".join(message["role"] for message in prompt + chosen)
        raise BadRow("template_refused", f"{error} (roles: {roles})") from error


def _encode(one: Rendered, prompt: list[int], chosen: list[int], rejected: list[int], encoder: Encoder) -> Encoded:
    """The example's ids from those of its three texts. Raises BadRow where nothing is left to train on."""
    tails = [
        _tail(prompt, whole, one.prompt, text, encoder)
        for whole, text in ((chosen, one.chosen), (rejected, one.rejected))
    ]
    rewritten = tails[0] is None or tails[1] is None
    if rewritten:
        prompt = prompt[: min(shared_length(prompt, chosen), shared_length(prompt, rejected))]
        tails = [chosen[len(prompt) :], rejected[len(prompt) :]]
    responses = [tail or [] for tail in tails]
    for name, response in zip(("chosen", "rejected"), responses, strict=True):
        if not response:
            raise BadRow("empty_response", f"{name} has no tokens of its own")
    if one.plain:
        prompt = prompt if tuple(prompt[: len(encoder.opening)]) == encoder.opening else [*encoder.opening, *prompt]
        end = encoder.tokenizer.eos_token_id
        responses = [ids if end is None or ids[-1] == end else [*ids, end] for ids in responses]
    if not prompt:
        raise BadRow("empty_prompt", "prompt and responses share no first token")
    room = encoder.max_length - len(prompt)
    if room <= 0:
        raise BadRow("prompt_too_long", f"the prompt has {len(prompt)} tokens, data.max_length is {encoder.max_length}")
    if responses[0] == responses[1]:
        raise BadRow("equal_responses", "chosen and rejected have the same tokens")
    if responses[0][:room] == responses[1][:room]:
        raise BadRow("equal_after_truncation", f"the first {room} tokens of both responses are the same")
    truncated = max(map(len, responses)) > room
    return Encoded(prompt, responses[0][:room], responses[1][:room], truncated, rewritten)


def _tail(prompt: list[int], whole: list[int], prompt_text: str, whole_text: str, encoder: Encoder) -> list[int] | None:
    """Ids of the response by rules 1 and 2; None where neither holds."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    if whole_text.startswith(prompt_text):
        return _ids([whole_text[len(prompt_text) :]], encoder)[0]
    return None


def _ids(texts: list[str], encoder: Encoder) -> list[list[int]]:
    """Each text's ids, without anything added."""
    if not texts:
        return []
    # verbose=False: no warning for texts beyond the tokenizer's model_max_length, which are cut later.
    return encoder.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
