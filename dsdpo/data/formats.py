"""The fields of a preference pair, found in a row of any known layout.

A layout is known by its field names; `columns` of the source wins over all of them. What each looks like stands in
docs/data.md. Rows with n completions become pairs by their scores or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any, Literal

from dsdpo.config.data import DataConfig, SourceConfig
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.messages import Turns, as_messages, read_turns, short

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "system",
    "tools",
    "chat_template_kwargs",
    "history",
    "completion",
    "label",
    "completions",
    "scores",
    "ranks",
    "margin",
    "weight",
    "confidence",
)
NUMBERS = ("margin", "weight", "confidence")  # of a whole row
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
POSSIBLE_PROMPTS = ("input", "query", "context", "post", "problem", "user", "human", "text", "messages", "input_text")
RESPONSE_KEYS = ("response", "text", "content", "completion", "answer", "output", "generated_text", "messages")
SCORE_KEYS = ("score", "overall_score", "rating", "reward")

# What a label column may say without `preferred_values`; numbers mean something else in every data set.
FIRST = {"a", "model_a", "response_a", "answer_a", "assistant_a", "conversation_a"}
SECOND = {name[:-1] + "b" for name in FIRST}
TIES = {"tie", "tie (bothbad)", "both", "both_bad", "bothbad", "both_good", "neither", "equal", "same", "draw"}

Pairing = Literal["best_worst", "adjacent", "all", "list"]


@dataclass(frozen=True)
class PreferredValues:
    """What the values of the label column mean."""

    chosen: tuple[Any, ...] = ()  # the response under `chosen` is preferred
    rejected: tuple[Any, ...] = ()  # the response under `rejected` is preferred
    tie: tuple[Any, ...] = ()  # neither is


@dataclass(frozen=True)
class RowRules:
    """How the rows of one source are read."""

    columns: Mapping[str, str | None] = field(default_factory=dict)  # our field names to the source's
    preferred_values: PreferredValues | None = None
    pairing: Pairing = "best_worst"  # of n scored completions
    min_score_gap: float = 0.0  # pairs of a smaller difference of scores are left out
    text_as_chat: bool = False  # text rows become messages
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # below the row's own


def rules_for(source: SourceConfig, data: DataConfig | None) -> RowRules:
    """The rules of one source under a run's settings."""
    values = source.preferred_values
    rules = RowRules(
        columns={str(ours): theirs for ours, theirs in (source.columns or {}).items()},
        preferred_values=PreferredValues(values.chosen, values.rejected, values.tie) if values else None,
    )
    if data is None:
        return rules
    return replace(
        rules,
        pairing=data.pairing,
        min_score_gap=data.min_score_gap,
        text_as_chat=data.text == "chat",
        chat_template_kwargs=data.chat_template_kwargs,
    )


def look_up(row: Any, name: str) -> Any:
    """The value under a column name: a key, keys joined by dots (through lists too), or several joined by commas."""
    if isinstance(row, dict) and name in row:
        return row[name]
    if "," in name:
        return [look_up(row, part.strip()) for part in name.split(",")]
    first, _, rest = name.partition(".")
    if isinstance(row, dict):
        found = row.get(first)
        return look_up(found, rest) if rest and found is not None else (None if rest else found)
    if isinstance(row, list):
        if first.isdigit():
            found = row[int(first)] if int(first) < len(row) else None
            return look_up(found, rest) if rest and found is not None else found
        return [look_up(item, name) for item in row]
    return None


def read_fields(row: dict[str, Any], rules: RowRules) -> dict[str, Any]:
    """Values of FIELDS, None where the row has none. Raises BadRow for images and the like."""
    for name in MEDIA:
        if row.get(name) and name not in rules.columns.values():
            raise BadRow("not_text", f"the row has {name}; models of text alone are trained here")
    mapped = {ours: theirs for ours, theirs in rules.columns.items() if theirs}
    fields = {name: look_up(row, mapped[name]) if name in mapped else row.get(name) for name in FIELDS}
    if "prompt" not in mapped and fields["prompt"] is None:
        fields |= _known_layout(row, fields, mapped)
    fields["history"] = _history(fields["history"])
    for name in NUMBERS:
        fields[name] = _number(name, fields[name])
    return fields


def pairs_of(row: dict[str, Any], fields: dict[str, Any], rules: RowRules) -> Iterator[dict[str, Any]]:
    """The fields once for each pair that the row holds, chosen the better. Raises BadRow where it holds none.

    One rated completion, and all n completions under `data.pairing` list, come as `responses` and their `values`, the
    higher, the better.
    """
    no_pair = fields["chosen"] is None and fields["rejected"] is None
    if rules.columns.get("completions") or (no_pair and fields["completions"] is not None):
        yield from _ranked_pairs(fields, rules)
        return
    if no_pair and fields["completion"] is not None:
        yield fields | {"responses": [fields["completion"]], "values": [_desirable(fields["label"])]}
        return
    for name in ("chosen", "rejected"):
        if fields[name] is None:
            raise BadRow("missing_field", f"{name} is missing")
    label = rules.columns.get("preferred")
    if label and _preferred(look_up(row, label), label, rules) == "rejected":
        fields = fields | {"chosen": fields["rejected"], "rejected": fields["chosen"]}
    yield fields


def other_prompt_field(row: Mapping[str, Any], rules: RowRules) -> str | None:
    """A field of the row that by its name may be the prompt and is not read as such."""
    used = set(rules.columns.values())
    return next((name for name in POSSIBLE_PROMPTS if row.get(name) and name not in used), None)


def _known_layout(row: dict[str, Any], fields: dict[str, Any], mapped: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a row that has no field named prompt, by the layout that its names speak of."""
    whole = row.get("input")
    if isinstance(whole, dict) and "messages" in whole and "chosen" not in mapped:  # OpenAI's preference format
        return {
            "prompt": whole["messages"],
            "tools": fields["tools"] or whole.get("tools"),
            "chosen": row.get("preferred_output"),
            "rejected": row.get("non_preferred_output"),
        }
    instruction = row.get("instruction")
    if isinstance(instruction, str) and instruction.strip():
        more = row.get("input")
        joins = isinstance(more, str) and more.strip() and "input" not in mapped.values()
        return {"prompt": f"{instruction}\n{more}" if joins else instruction}
    for name in ("question", "conversations"):
        if row.get(name) and name not in mapped.values():
            return {"prompt": row[name]}
    if isinstance(fields["history"], str):
        return {"prompt": fields["history"], "history": None}
    return {}


def _history(value: Any) -> list[dict[str, Any]]:
    """Earlier turns, given as [question, answer] pairs or as messages, as messages."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        return [
            message
            for question, answer in value
            for message in (*as_messages(read_turns("history", question), "user"), *_answer(answer))
        ]
    turns: Turns = read_turns("history", value)
    if isinstance(turns, str):
        raise BadRow("wrong_type", f"history is a list of [question, answer] or of messages, not {short(value)}")
    return turns


def _answer(value: Any) -> list[dict[str, Any]]:
    return as_messages(read_turns("history", value), "assistant")


def _number(name: str, value: Any) -> float | None:
    """A finite number, given as such or as text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("wrong_type", f"{name} is a number, not {short(value)}")
    if name == "weight" and number < 0:
        raise BadRow("wrong_type", f"weight is 0 or more, not {short(value)}")
    if name == "confidence" and not 0 <= number <= 1:
        raise BadRow("wrong_type", f"confidence is between 0 and 1, not {short(value)}")
    return number


def _preferred(value: Any, label: str, rules: RowRules) -> Literal["chosen", "rejected"]:
    """Which of the two responses the label prefers. Raises BadRow for a tie and for a value without a meaning."""
    if value is None:
        raise BadRow("missing_field", f"{label} (which response is preferred) is missing")
    if isinstance(value, list):
        return _one_hot(value, label)
    known = rules.preferred_values
    if known is not None:
        for meaning, values in (("chosen", known.chosen), ("rejected", known.rejected), ("tie", known.tie)):
            if any(_same_label(value, one) for one in values):
                return _no_tie(meaning, label, value)
        raise BadRow("unknown_preference", f"{label} is {short(value)}, which preferred_values does not name")
    text = value.strip().lower() if isinstance(value, str) else None
    names = {name: str(rules.columns.get(name, name)).lower() for name in ("chosen", "rejected")}
    for meaning, words in (("chosen", FIRST), ("rejected", SECOND), ("tie", TIES)):
        if text is not None and (text in words or text == names.get(meaning)):
            return _no_tie(meaning, label, value)
    raise BadRow(
        "unknown_preference",
        f"{label} is {short(value)}: say what it means, e.g. preferred_values: {{chosen: [1], rejected: [0]}}",
    )


def _one_hot(values: list[Any], label: str) -> Literal["chosen", "rejected"]:
    """What two or three columns say of which one is true: the first, the second, or a tie."""
    texts = [str(int(value)) if isinstance(value, float) and value.is_integer() else str(value) for value in values]
    true = [text.strip().lower() in ("1", "true") for text in texts]
    false = [text.strip().lower() in ("0", "false", "none") for text in texts]
    if len(values) not in (2, 3) or sum(true) != 1 or not all(a or b for a, b in zip(true, false, strict=True)):
        raise BadRow(
            "unknown_preference",
            f"{label} is {short(values)}: of two columns (chosen, rejected) or three (and tie) one is 1, the others 0",
        )
    return _no_tie(("chosen", "rejected", "tie")[true.index(True)], label, values)


def _no_tie(meaning: str, label: str, value: Any) -> Literal["chosen", "rejected"]:
    if meaning == "tie":
        raise BadRow("tie", f"{label} is {short(value)}")
    return "chosen" if meaning == "chosen" else "rejected"


def _same_label(value: Any, one: Any) -> bool:
    """Equal, numbers also where one of them is text, and truth values only with truth values."""
    if isinstance(value, bool) or isinstance(one, bool):
        return str(value).strip().lower() == str(one).strip().lower()
    if isinstance(value, str) and isinstance(one, str):
        return value.strip().lower() == one.strip().lower()
    try:
        return float(value) == float(one)
    except (TypeError, ValueError, OverflowError):
        return False


def _ranked_pairs(fields: dict[str, Any], rules: RowRules) -> Iterator[dict[str, Any]]:
    """Pairs out of a list of completions with scores (higher is better) or ranks (lower is better)."""
    responses, values, ranked = _completions(fields)
    order = sorted(range(len(values)), key=lambda index: values[index], reverse=not ranked)
    if len(order) < 2:
        raise BadRow("missing_field", f"{len(order)} of the completions has a score or rank; a pair needs two")
    if rules.pairing == "list":
        yield fields | _list(responses, values, order, ranked)
        return
    candidates: list[tuple[int, int]]
    match rules.pairing:
        case "best_worst":
            candidates = [(order[0], order[-1])]
        case "adjacent":
            candidates = list(pairwise(order))
        case "all":
            candidates = list(combinations(order, 2))
    found = False
    for better, worse in candidates:
        gap = abs(values[better] - values[worse])
        if gap == 0 or gap < rules.min_score_gap or responses[better] == responses[worse]:
            continue
        found = True
        margin = fields["margin"] if fields["margin"] is not None or ranked else gap
        yield fields | {"chosen": responses[better], "rejected": responses[worse], "margin": margin}
    if not found:
        smallest = rules.min_score_gap or "more than 0"
        raise BadRow("tie", f"no two different completions whose scores differ by {smallest}: {short(values)}")


def _list(responses: list[Any], values: list[float], order: list[int], ranked: bool) -> dict[str, Any]:
    """All different responses, best first, and their values. Raises BadRow unless two of these differ."""
    kept: list[int] = []
    for index in order:
        if all(responses[index] != responses[other] for other in kept):
            kept.append(index)
    if len({values[index] for index in kept}) < 2:
        raise BadRow("tie", f"no two different completions whose scores differ: {short(values)}")
    sign = -1.0 if ranked else 1.0
    return {"responses": [responses[index] for index in kept], "values": [sign * values[index] for index in kept]}


DESIRABLE = {"true": 1.0, "1": 1.0, "desirable": 1.0, "chosen": 1.0, "good": 1.0}
UNDESIRABLE = {"false": 0.0, "0": 0.0, "-1": 0.0, "undesirable": 0.0, "rejected": 0.0, "bad": 0.0}


def _desirable(label: Any) -> float:
    """1 for a completion that the label calls good, 0 for one that it calls bad."""
    if label is None:
        raise BadRow("missing_field", "label (whether the completion is desirable) is missing")
    text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip().lower()
    found = (DESIRABLE | UNDESIRABLE).get(text)
    if found is None:
        raise BadRow("unknown_preference", f"label is {short(label)}: true or false is read, and 1, 0 or -1")
    return found


def _completions(fields: dict[str, Any]) -> tuple[list[Any], list[float], bool]:
    """Responses that have a score or rank, those numbers, and whether they are ranks."""
    items = fields["completions"]
    if not isinstance(items, list):
        raise BadRow("wrong_type", f"completions is a list, not {short(items)}")
    ranked = fields["scores"] is None and (fields["ranks"] is not None or _has_ranks(items))
    given = fields["ranks"] if ranked else fields["scores"]
    name = "ranks" if ranked else "scores"
    if given is None:
        keys = ("rank",) if ranked else SCORE_KEYS
        given = [_first(item, keys) for item in items]
    if not isinstance(given, list) or len(given) != len(items):
        count = len(given) if isinstance(given, list) else short(given)
        raise BadRow("wrong_type", f"{len(items)} completions, but {name} has {count}")
    both = [(_response(item), _number(name, value)) for item, value in zip(items, given, strict=True)]
    kept = [(response, value) for response, value in both if value is not None and response is not None]
    return [response for response, _ in kept], [value for _, value in kept], ranked


def _has_ranks(items: Sequence[Any]) -> bool:
    return any(isinstance(item, dict) and "rank" in item and _first(item, SCORE_KEYS) is None for item in items)


def _response(item: Any) -> Any:
    """The response in one entry of completions: text, messages, or an object that holds it."""
    if isinstance(item, dict) and "role" not in item and "from" not in item:
        return _first(item, RESPONSE_KEYS)
    return item


def _first(item: Any, keys: Sequence[str]) -> Any:
    return next((item[key] for key in keys if item.get(key) is not None), None) if isinstance(item, dict) else None
