"""The layouts of the most used preference sets, as small files of invented content, and what is read of other rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.data import DataConfig
from dsdpo.data.dropped_rows import KINDS, BadRow
from dsdpo.data.examples import to_examples
from dsdpo.data.formats import FIELDS, RowRules
from dsdpo.data.sources import find_sources, read_rows
from dsdpo.errors import DataError
from tests.data.helpers import assistant, user, write_jsonl

FORMATS = Path(__file__).parent / "formats"
QUESTIONS = ("Where do swallows winter?", "How long is a fathom?")
GOOD = ("Most of them in Africa.", "Six feet.")
BAD = ("I cannot say.", "A mile.")
GREETING = [user("Hello"), assistant("Good day.")]


def sources_of(path: Path, source: dict[str, Any], settings: dict[str, Any]) -> Any:
    data = DataConfig.model_validate({"train": [{"path": str(path), **source}], **settings})
    return find_sources(data.train, "train", data)[0]


def examples_of(path: Path, source: dict[str, Any] | None = None, **settings: Any) -> list[dict[str, Any] | str]:
    """What every row of the file becomes: its examples, or the kind of bad row."""
    found: list[dict[str, Any] | str] = []
    opened = sources_of(path, source or {}, settings)
    for _, row in read_rows(opened):
        try:
            found += to_examples(row, opened.rules)
        except BadRow as bad:
            found.append(bad.kind)
    return found


def chat(question: str, good: str, bad: str, *, before: list[dict[str, str]] | None = None) -> dict[str, Any]:
    return {
        "prompt": [*(before or []), user(question)],
        "chosen": [assistant(good)],
        "rejected": [assistant(bad)],
    }


def text(question: str, good: str, bad: str) -> dict[str, Any]:
    return {"prompt": question, "chosen": good, "rejected": bad}


def both(make: Any, **options: Any) -> list[dict[str, Any]]:
    return [make(*row, **options) for row in zip(QUESTIONS, GOOD, BAD, strict=True)]


HH = "\n\nHuman: Hello\n\nAssistant: Good day.\n\nHuman: {}\n\nAssistant:"
HELPSTEER = {
    "columns": {
        "prompt": "context", "chosen": "response1", "rejected": "response2", "preferred": "overall_preference",
    },
    "preferred_values": {"chosen": [-3, -2, -1], "rejected": [1, 2, 3], "tie": 0},
}  # fmt: skip
SAFE = {"chosen": "response_0", "rejected": "response_1", "preferred": "better_response_id"}
REFS = {"chosen": "human_ref_A", "rejected": "human_ref_B", "preferred": "labels"}
ARENA = {"chosen": "conversation_a", "rejected": "conversation_b", "preferred": "winner"}
BRIEF = "You answer briefly.\n\n"

SETS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "ultrafeedback_binarized_trl.jsonl": ({}, both(chat)),
    "ultrafeedback_binarized_h4.jsonl": ({}, both(chat)),
    "hh_rlhf.jsonl": ({}, [text(HH.format(q), f" {g}", f" {b}") for q, g, b in zip(QUESTIONS, GOOD, BAD, strict=True)]),
    "orca_dpo_pairs.jsonl": ({}, [text(BRIEF + QUESTIONS[0], GOOD[0], BAD[0]), text(QUESTIONS[1], GOOD[1], BAD[1])]),
    "distilabel_orca.jsonl": (
        {"columns": {"prompt": "input"}},
        [text(BRIEF + q, g, b) for q, g, b in zip(QUESTIONS, GOOD, BAD, strict=True)],
    ),
    "tulu_3_mixture.jsonl": ({}, both(chat)),
    "dpo_mix_7k.jsonl": ({}, both(chat, before=[{"role": "system", "content": "Be exact."}])),
    "shp.jsonl": ({"columns": REFS, "preferred_values": {"chosen": 1, "rejected": 0}}, both(text)),
    "pku_saferlhf.jsonl": ({"columns": SAFE, "preferred_values": {"chosen": 0, "rejected": 1}}, both(text)),
    "helpsteer3.jsonl": (
        HELPSTEER,
        [chat(QUESTIONS[0], GOOD[0], BAD[0], before=GREETING), chat(QUESTIONS[1], GOOD[1], BAD[1]), "tie"],
    ),
    "ultrafeedback_raw.jsonl": ({}, [one | {"margin": 5.5} for one in both(text)]),
    "nectar.jsonl": (
        {"columns": {"completions": "answers"}},
        [text(f"\n\nHuman: {q}\n\nAssistant: ", g, b) for q, g, b in zip(QUESTIONS, GOOD, BAD, strict=True)],
    ),
    "arena_human_preference.jsonl": ({"columns": ARENA}, [*both(chat), "tie"]),
    "llama_factory_sharegpt.json": ({}, both(chat, before=GREETING)),
    "llama_factory_alpaca.json": (
        {},
        [
            chat(f"Answer the question.\n{q}", g, b, before=GREETING)
            for q, g, b in zip(QUESTIONS, GOOD, BAD, strict=True)
        ],
    ),
    "openai_preference.jsonl": ({}, both(chat)),
    "capybara_dpo.jsonl": ({}, both(chat)),
    "truthy_dpo.jsonl": (
        {},
        [text(f"You are honest.\n\n{q}", g, b) for q, g, b in zip(QUESTIONS, GOOD, BAD, strict=True)],
    ),
    "table.csv": ({}, [one | {"margin": 1.5} for one in both(chat)]),
}


@pytest.mark.parametrize("name", SETS)
def test_layouts_of_the_most_used_sets(name: str) -> None:
    source, expected = SETS[name]
    assert examples_of(FORMATS / name, source) == expected


def test_every_layout_has_its_test() -> None:
    assert {path.name for path in FORMATS.iterdir()} == set(SETS)


@pytest.mark.parametrize(
    "name", ["shp.jsonl", "pku_saferlhf.jsonl", "helpsteer3.jsonl", "arena_human_preference.jsonl"]
)
def test_first_and_second_response_columns_need_a_label_column(name: str) -> None:
    columns = {ours: theirs for ours, theirs in SETS[name][0]["columns"].items() if ours != "preferred"}
    with pytest.raises(DataError, match="which response came first, not which is better") as caught:
        examples_of(FORMATS / name, {"columns": columns})
    assert SETS[name][0]["columns"]["preferred"] in str(caught.value)
    assert len(examples_of(FORMATS / name, {"columns": {**columns, "preferred": None}})) >= 2


def test_numbers_of_a_label_column_need_a_meaning() -> None:
    assert examples_of(FORMATS / "shp.jsonl", {"columns": REFS}) == ["unknown_preference"] * 2
    values = {"chosen": "1", "rejected": 2}
    assert examples_of(FORMATS / "shp.jsonl", {"columns": REFS, "preferred_values": values})[1] == "unknown_preference"


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({}, [("good", "bad", 7.0)]),
        ({"pairing": "adjacent"}, [("good", "fair", 2.0), ("fair", "bad", 5.0)]),
        ({"pairing": "all"}, [("good", "fair", 2.0), ("good", "bad", 7.0), ("fair", "bad", 5.0)]),
        ({"pairing": "all", "min_score_gap": 3}, [("good", "bad", 7.0), ("fair", "bad", 5.0)]),
    ],
)
def test_scored_completions_become_pairs(
    tmp_path: Path, settings: dict[str, Any], pairs: list[tuple[str, str, float]]
) -> None:
    rows = [{"prompt": "q", "texts": ["fair", "bad", "good", "unrated"], "marks": {"all": [7, 2, 9, None]}}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"completions": "texts", "scores": "marks.all"}
    found = examples_of(path, {"columns": columns}, **settings)
    assert found == [{"prompt": "q", "chosen": c, "rejected": r, "margin": m} for c, r, m in pairs]


def test_equal_scores_make_no_pair_and_are_no_bad_row(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]}]
    assert examples_of(write_jsonl(tmp_path / "a.jsonl", rows)) == ["tie"]


def test_columns_may_lead_into_objects_and_lists_or_name_several(tmp_path: Path) -> None:
    rows = [{"q": {"text": "p"}, "a": [{"t": "x"}, {"t": "y"}], "s0": 1, "s1": 2}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "q.text", "chosen": "a.1.t", "rejected": "a.0.t"}
    assert examples_of(path, {"columns": columns}) == [text("p", "y", "x")]
    listed = {"prompt": "q.text", "completions": "a.t", "scores": "s0, s1"}
    assert examples_of(path, {"columns": listed}) == [{**text("p", "y", "x"), "margin": 1.0}]
    with pytest.raises(DataError, match=r"no q\.words \(for prompt\)"):
        examples_of(path, {"columns": {**columns, "prompt": "q.words"}})


Q, A, B = user("u"), assistant("a"), assistant("b")
S = {"role": "system", "content": "s"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
CALL_AS_TEXT = {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
LONG = "Name three rivers that flow north."

READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "content in text parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "u"}]}], "chosen": [A], "rejected": [B]},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    "content in text parts, as text": (
        {
            "prompt": [{"role": "user", "content": '[{"type": "text", "text": "u"}]'}],
            "chosen": [{"role": "assistant", "content": "[{'type': 'text', 'text': 'a'}]"}],
            "rejected": [B],
        },
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    "fields in text parts, as text": (
        {
            "prompt": '[{"type": "text", "text": "u"}]',
            "chosen": '[{"type": "text", "text": "a"}]',
            "rejected": "[{'type': 'text', 'text': 'b'}]",
        },
        {"prompt": "u", "chosen": "a", "rejected": "b"},
    ),
    "system message as JSON text": (
        {"system": json.dumps([S]), "prompt": [Q], "chosen": [A], "rejected": [B]},
        {"prompt": [S, Q], "chosen": [A], "rejected": [B]},
    ),
    "system message in parts": (
        {"system": [{"type": "text", "text": "s"}], "prompt": [Q], "chosen": [A], "rejected": [B]},
        {"prompt": [S, Q], "chosen": [A], "rejected": [B]},
    ),
    "messages as JSON text": (
        {"prompt": json.dumps([Q]), "chosen": json.dumps([A]), "rejected": json.dumps(B)},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    "messages as Python text": (
        {"prompt": str([Q]), "chosen": str([A]), "rejected": str([B])},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    "arguments as JSON text": (
        {"prompt": [Q], "chosen": [{**CALLED, "content": None, "tool_calls": [CALL_AS_TEXT]}], "rejected": [B]},
        {"prompt": [Q], "chosen": [CALLED], "rejected": [B]},
    ),
    "prompt repeated but for spaces": (
        {"prompt": [user("u ")], "chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": [user("u ")], "chosen": [A], "rejected": [B]},
    ),
    "system in the dialogues alone": (
        {"prompt": [Q], "chosen": [S, Q, A], "rejected": [S, Q, B]},
        {"prompt": [S, Q], "chosen": [A], "rejected": [B]},
    ),
    "system in the prompt alone": (
        {"prompt": [S, Q], "chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": [S, Q], "chosen": [A], "rejected": [B]},
    ),
    "prompt repeated by one of two": (
        {"prompt": [Q], "chosen": [Q, A], "rejected": [B]},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    "last question beside whole dialogues": (
        {"prompt": [user("v")], "chosen": [Q, A, user("v"), A], "rejected": [Q, A, user("v"), B]},
        {"prompt": [Q, A, user("v")], "chosen": [A], "rejected": [B]},
    ),
    "begun answer, repeated by one": (
        {"prompt": [Q, assistant("It is ")], "chosen": [assistant("It is four")], "rejected": [assistant("five")]},
        {"prompt": [Q, assistant("It is ")], "chosen": [assistant("four")], "rejected": [assistant("five")]},
    ),
    "text that repeats the prompt": (
        {"prompt": f"{LONG} ", "chosen": f"{LONG} Nile", "rejected": f"{LONG} Po"},
        {"prompt": f"{LONG} ", "chosen": "Nile", "rejected": "Po"},
    ),
    "short prompt that an answer begins with by chance": (
        {"prompt": "Hello", "chosen": "Hello! Well?", "rejected": "Hello there"},
        {"prompt": "Hello", "chosen": "Hello! Well?", "rejected": "Hello there"},
    ),
    "margin and weight as text": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "0.5", "weight": "2"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5, "weight": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_rows_are_read_whole_with_the_prompt_once(case: str) -> None:
    row, example = READ[case]
    assert to_examples(row, RowRules()) == [example]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "image part": ({"prompt": [user([{"type": "image"}])], "chosen": [A], "rejected": [B]}, "not_text"),
    "images column": ({"prompt": "p", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "not_text"),
    "audio part of a response": (
        {"prompt": [Q], "chosen": [{"role": "assistant", "content": [{"type": "input_audio"}]}], "rejected": [B]},
        "not_text",
    ),
    "another question in the dialogues": (
        {"prompt": [user("x")], "chosen": [Q, A], "rejected": [Q, B]},
        "prompt_mismatch",
    ),
    "another question as text": ({"prompt": "x?", "chosen": [Q, A], "rejected": [Q, B]}, "prompt_mismatch"),
    "two system messages": (
        {"prompt": [S, Q], "chosen": [{**S, "content": "t"}, Q, A], "rejected": [B]},
        "prompt_mismatch",
    ),
    "text that one repeats": ({"prompt": LONG, "chosen": f"{LONG} Nile", "rejected": "Po"}, "prompt_mismatch"),
    "answers without a prompt": ({"chosen": [A], "rejected": [B]}, "no_common_prompt"),
    "text with an unmapped question": (
        {"query": "q", "chosen": "It is four", "rejected": "It is five"},
        "no_common_prompt",
    ),
    "broken list of messages": (
        {"prompt": "p", "chosen": '[{"role": "assistant", "content": ', "rejected": "b"},
        "wrong_type",
    ),
    "margin that is no number": ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"}, "wrong_type"),
    "negative weight": ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}, "wrong_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_whole_is_refused_with_its_kind(case: str) -> None:
    row, kind = REFUSED[case]
    with pytest.raises(BadRow) as caught:
        to_examples(row, RowRules())
    assert caught.value.kind == kind, caught.value.detail


def test_text_becomes_messages_where_the_run_asks() -> None:
    chat_rules = RowRules(text_as_chat=True, chat_template_kwargs={"enable_thinking": False})
    row = {"system": "s", "prompt": " p", "chosen": "a ", "rejected": "b"}
    (example,) = to_examples(row, chat_rules)
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    assert example == {"prompt": [S, user("p")], "chosen": [A], "rejected": [B], **options}
    dialogue = HH.format("u")
    (example,) = to_examples({"chosen": f"{dialogue} a", "rejected": f"{dialogue} b"}, chat_rules)
    assert example == {"prompt": [*GREETING, Q], "chosen": [A], "rejected": [B], **options}
    own = {"prompt": [Q], "chosen": [A], "rejected": [B], "chat_template_kwargs": {"enable_thinking": True}}
    assert to_examples(own, chat_rules)[0]["chat_template_kwargs"] == {"enable_thinking": True}


DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_example_of_the_documentation_is_read() -> None:
    blocks = re.findall(r"```json\n(.*?)```", DOCS, flags=re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(rows) >= 18
    for row in rows:
        examples = to_examples(row, RowRules())
        for name in ("chosen", "rejected"):
            assert "Where?" not in json.dumps(examples[0][name]), row


def test_every_kind_of_bad_row_and_every_setting_of_data_is_documented() -> None:
    assert [kind for kind in KINDS if f"`{kind}`" not in DOCS] == []
    told = {"train", "eval", "max_length", "text", "pairing", "min_score_gap", "chat_template_kwargs", "add_eos"}
    told |= {"keep_thoughts", "date", "train_on", "truncation", "max_prompt_length", "strict", "max_dropped_share"}
    assert [name for name in told if name not in DataConfig.model_fields or name not in DOCS] == []
    assert [name for name in FIELDS if f"`{name}`" not in DOCS] == []


def one_hot(values: list[Any]) -> dict[str, Any]:
    """The pair of a row whose label is spread over columns."""
    names = ["winner_model_a", "winner_model_b", "winner_tie"][: len(values)]
    row = {"prompt": "Which?", "response_a": "A", "response_b": "B", **dict(zip(names, values, strict=True))}
    columns = {"chosen": "response_a", "rejected": "response_b", "preferred": ", ".join(names)}
    return to_examples(row, RowRules(columns))[0]


@pytest.mark.parametrize(
    ("values", "chosen"),
    [([1, 0, 0], "A"), ([0, 1, 0], "B"), ([True, False], "A"), (["0", "1"], "B"), ([0.0, 1.0], "B")],
)
def test_labels_spread_over_columns(values: list[Any], chosen: str) -> None:
    assert one_hot(values)["chosen"] == chosen


@pytest.mark.parametrize(
    ("values", "kind"),
    [([0, 0, 1], "tie"), *((values, "unknown_preference") for values in ([1, 1], [0, 0], [0.7, 0.3], [2, 0, 0]))],
)
def test_columns_of_which_not_one_is_true(values: list[Any], kind: str) -> None:
    with pytest.raises(BadRow) as caught:
        one_hot(values)
    assert caught.value.kind == kind


def test_columns_that_look_like_a_spread_label_are_pointed_at(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer_a": "A", "answer_b": "B", "winner_a": 1, "winner_b": 0}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    source = {"path": str(path), "columns": {"chosen": "answer_a", "rejected": "answer_b"}}
    data = DataConfig.model_validate({"train": source})
    with pytest.raises(DataError, match=r'\{preferred: "winner_a, winner_b"\}: of the columns .* one is 1'):
        list(read_rows(find_sources(data.train, "train", data)[0]))
