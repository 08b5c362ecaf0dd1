"""The border between prompt and response, with tokenizers that put a space of their own before a text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsdpo.data.encode import Encoded, encode_examples, make_encoder
from dsdpo.data.examples import to_example
from tests.data.helpers import assistant, letter_tokenizer, user, words

TRAINED_ON = ["Choose the right option . Answer : Yes No Maybe Yes No Choose the right ok ? yes ye s"] * 20
SPACE = "\u2581"


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Metaspace with a prepend scheme (Mistral, Phi-3), or the normalizer that Llama 2 has in its place."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "normalizer"))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=kind, split=True)
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "normalizer" else []
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *pieces])
    backend.train_from_iterator(TRAINED_ON, trainer)
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="never" if kind == "never" else "first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ ' Choose ' + m.content + ' Answer : ' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "text behind a space": ({"prompt": "Answer : ", "chosen": "Yes", "rejected": "No"}, "Answer : "),
    "text inside a word": ({"prompt": "ok ? ye", "chosen": "s", "rejected": " No"}, "ok ? ye"),
    "text at a word": ({"prompt": "Answer :", "chosen": " Yes", "rejected": " Maybe"}, "Answer :"),
    "messages behind a space": (
        {"prompt": [user("the right option .")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        " Choose the right option . Answer : ",
    ),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("kind", ["first", "always", "never", "normalizer"])
def test_prompt_and_response_spell_the_text_and_no_space_is_added(kind: str, case: str) -> None:
    tokenizer = sentencepiece_like(kind)
    row, prompt = ROWS[case]
    (result,) = encode_examples([to_example(row, {})], make_encoder(tokenizer, max_length=99))
    assert isinstance(result, Encoded), result
    for name, ids in (("chosen", result.chosen), ("rejected", result.rejected)):
        response = row[name] if isinstance(row[name], str) else row[name][0]["content"]
        pieces = tokenizer.convert_ids_to_tokens(result.prompt + ids)
        spelled = "".join(piece for piece in pieces if piece not in ("<s>", "</s>")).replace(SPACE, " ")
        assert spelled.lstrip() == (prompt + response).lstrip(), pieces
        own = "".join(tokenizer.convert_ids_to_tokens(ids)).replace(SPACE, " ").removesuffix("</s>")
        assert own == response or (own, result.rewritten) == (f" {response}", True)
        assert ids[-1] == tokenizer.eos_token_id


def test_both_responses_of_a_pair_follow_one_rule() -> None:
    # "ay" is one token, so the border is inside a token for one response alone; the other is split as that one is.
    tokenizer = letter_tokenizer(merges=[("a", "y"), ("n", "o")])
    example = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    (result,) = encode_examples([example], make_encoder(tokenizer, max_length=99, add_eos="never"))
    assert isinstance(result, Encoded), result
    assert [words(tokenizer, ids) for ids in (result.prompt, result.chosen, result.rejected)] == ["uq;a", "yes;", "no;"]
    assert len(result.rejected) == 2  # "no" is a token of its own, as generation would have it


def test_rows_with_merged_borders_are_encoded_in_a_few_calls() -> None:
    tokenizer = letter_tokenizer(merges=[("a", "y")])
    rows = [
        {"prompt": [user(f"q{i}")], "chosen": [assistant(f"yes{i}")], "rejected": [assistant("no")]} for i in range(200)
    ]
    calls = []
    encoder = make_encoder(tokenizer, max_length=99)
    original = type(tokenizer).__call__

    class Counted(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return original(self, *args, **kwargs)

    tokenizer.__class__ = Counted
    results = encode_examples(rows, encoder)
    assert all(isinstance(result, Encoded) for result in results)
    assert len(calls) <= 5
