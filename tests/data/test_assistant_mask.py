"""Responses of several turns: the assistant's tokens are learned, users' and tools' are read."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.config.data import DataConfig
from dsdpo.data.assistant_mask import TrainOn
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.encode import Encoded, encode_examples, make_encoder
from dsdpo.data.pairs import open_pairs
from dsdpo.data.tokenize import prepare_pairs
from dsdpo.reference.store import pair_keys
from tests.data.helpers import assistant, letter_tokenizer, user, words, write_jsonl

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"
# Thoughts of all but the last turn are cut, and a generation prompt begins one.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}|{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
END_BEHIND_ALL = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration"
    " %}|{% else %}{{ m.content }}|{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SEVERAL = {
    "prompt": [user("Q1?")],
    "chosen": [assistant("A1 yes."), user("U2 more"), assistant("A2 fine.")],
    "rejected": [assistant("A1 no.")],
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "calc", "arguments": {"x": 4}}}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer", "description": "n"}}, "required": ["x"]}
TOOLS = {
    "prompt": [user("Q1?")],
    "tools": [{"type": "function", "function": {"name": "calc", "description": "d", "parameters": PARAMETERS}}],
    "chosen": [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "calc", "tool_call_id": "abcdefghi", "content": "T9"},
        assistant("A2 fine."),
    ],
    "rejected": [assistant("A1 no.")],
}


def encoded(example: dict[str, Any], tokenizer: Any, train_on: TrainOn = "assistant", length: int = 9000) -> Any:
    (result,) = encode_examples([example], make_encoder(tokenizer, max_length=length, train_on=train_on))
    return result


def learned(result: Encoded, tokenizer: Any, index: int = 0) -> list[str]:
    """The stretches of a response's text that are learned."""
    mask = (result.learned[index] if result.learned else None) or [True] * len(result.responses[index])
    places = groupby(zip(result.responses[index], mask, strict=True), key=lambda pair: pair[1])
    return [words(tokenizer, [token for token, _ in run]) for is_learned, run in places if is_learned]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["A1 yes.|", "A2 fine.|</s>"]),
        (END_BEHIND_ALL, ["A1 yes.|", "A2 fine.|</s>"]),
        (MARKED, ["A1 yes.", "A2 fine.", "</s>"]),  # what follows is not marked, but for the end that is added
    ],
)
def test_users_turns_are_not_learned(template: str, expected: list[str]) -> None:
    tokenizer = letter_tokenizer(template=template)
    result = encoded(SEVERAL, tokenizer)
    assert learned(result, tokenizer) == expected
    assert result.learned[1] is None, "one message is learned whole"
    assert "turns_masked" in result.notes
    whole = encoded(SEVERAL, tokenizer, "all")
    assert whole.learned == ()
    assert whole.responses == result.responses
    last = learned(encoded(SEVERAL, tokenizer, "last"), tokenizer)
    assert last == expected[1:]


def test_one_message_is_learned_whole_whatever_the_setting() -> None:
    tokenizer = letter_tokenizer(template=MARKED)
    example = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    for train_on in ("all", "assistant", "last"):
        assert encoded(example, tokenizer, train_on).learned == ()


def test_turns_are_found_where_thoughts_are_cut_from_the_history() -> None:
    tokenizer = letter_tokenizer(template=THINKING)
    example = {**SEVERAL, "chosen": [assistant("<think>hm</think>A1 yes."), *SEVERAL["chosen"][1:]]}
    example["chosen"] = [*example["chosen"][:2], assistant("<think>ok</think>A2 fine.")]
    assert learned(encoded(example, tokenizer), tokenizer)[-1].startswith("ok</think>A2 fine.|")
    assert "A1 yes.|" in learned(encoded(example, tokenizer), tokenizer)[0]
    assert "U2" not in "".join(learned(encoded(example, tokenizer), tokenizer))


def test_tokens_that_merge_across_borders_belong_where_they_begin() -> None:
    tokenizer = letter_tokenizer(template=CHATML, merges=[("]", "A"), ("|", "[")])
    result = encoded(SEVERAL, tokenizer)
    assert learned(result, tokenizer) == ["A1 yes.|[", "2 fine.|</s>"]


def test_truncation_that_leaves_nothing_to_learn_makes_a_bad_row() -> None:
    tokenizer = letter_tokenizer(template=CHATML)
    prompt = len("[user]Q1?|[assistant]")
    bad = encoded(SEVERAL, tokenizer, "last", prompt + 20)
    assert isinstance(bad, BadRow)
    assert bad.kind == "nothing_learned"
    assert learned(encoded(SEVERAL, tokenizer, "assistant", prompt + 20), tokenizer) == ["A1 yes.|"]


def test_a_template_whose_turns_cannot_be_told_is_refused() -> None:
    moved = "{% for m in messages if m.role == 'user' %}{{ m.content }};{% endfor %}" + (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }};{% endfor %}"
    )
    bad = encoded(SEVERAL, letter_tokenizer(template=moved))
    assert isinstance(bad, BadRow)
    assert bad.kind == "unknown_turns"


def test_templates_that_people_use() -> None:
    """The templates that TRL ships: answers and calls are learned, and nothing that users and tools say."""
    trl = pytest.importorskip("trl")
    seen, refused = 0, []
    for path in sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja")):
        tokenizer = letter_tokenizer(template=path.read_text())
        for name, example in (("several", SEVERAL), ("tools", TOOLS)):
            result = encoded(example, tokenizer)
            if isinstance(result, BadRow):
                refused.append((path.name, name, result.kind))
                continue
            seen += 1
            text = "\n".join(learned(result, tokenizer))
            for said in ("A2 fine.", *(["A1 yes."] if name == "several" else ["calc"])):
                assert said in text, (path.name, name, text)
            for read in ("U2 more", "T9", "Q1?"):
                assert read not in text, (path.name, name, text)
    assert seen > 60
    assert not [entry for entry in refused if entry[2] in ("unknown_turns", "nothing_learned")]


def test_masks_are_stored_and_part_of_the_keys_of_log_probs(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(template=CHATML)
    single = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    path = write_jsonl(tmp_path / "a.jsonl", [single, SEVERAL, single | {"prompt": [user("r")]}])
    made = {}
    for train_on in ("all", "assistant", "last"):
        sources = [{"path": str(path), "weight": 2.0}]
        data = DataConfig.model_validate({"train": sources, "cache_dir": str(tmp_path), "train_on": train_on})
        folder = prepare_pairs(data.train, tokenizer, data=data, seed=0, default_split="train")
        made[train_on] = open_pairs(folder)
        assert (folder / "unlearned.npy").exists() == (train_on != "all")
    whole, masked, last = made.values()
    assert len({pairs.digest for pairs in made.values()}) == 3
    keys = {name: pair_keys(pairs) for name, pairs in made.items()}
    assert np.array_equal(keys["all"][[0, 2, 3, 5]], keys["assistant"][[0, 2, 3, 5]])
    assert len({keys[name][1] for name in made}) == 3
    assert np.array_equal(keys["last"][:3], keys["last"][3:])
    assert np.array_equal(keys["last"][[4]], pair_keys(last, [4]))
    group = masked[[4]][0]
    mask = group.learned_of(0)
    assert mask is not None
    assert words(tokenizer, group.responses[0][mask]) == "A1 yes.|A2 fine.|</s>"
    assert group.learned_of(1) is None
    assert whole[[1]][0].learned == ()
    assert masked[[0]][0].learned == ()
