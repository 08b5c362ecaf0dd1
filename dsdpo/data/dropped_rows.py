"""What became of the rows that were read: kept, dropped by kind, cut; readable, and stored beside the pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from dsdpo.console import counted
from dsdpo.errors import DataError

PLACES_LISTED = 5

KINDS = {
    "invalid_json": "not valid JSON",
    "invalid_table": "not a record of its table",
    "missing_field": "a field is missing",
    "empty_field": "a field is empty",
    "wrong_type": "a field has the wrong type",
    "not_text": "the row holds images or other parts that are not text",
    "no_common_prompt": "no prompt given, and the two dialogues have no common beginning",
    "prompt_mismatch": "prompt and responses do not fit together",
    "unknown_preference": "the label column has a value whose meaning is not known",
    "tie": "neither response is preferred",
    "equal_responses": "chosen and rejected are the same",
    "not_by_assistant": "the last message of a response is not by the assistant",
    "template_refused": "the chat template refuses the messages",
    "template_drops": "the chat template leaves a part of the messages out",
    "unknown_turns": "which part of a response is the assistant's cannot be told from what the chat template writes "
    "(data.train_on: all learns the whole)",
    "nothing_learned": "a response has no token to learn, once cut to data.max_length",
    "empty_prompt": "the prompt has no tokens",
    "empty_response": "a response has no tokens",
    "prompt_too_long": "the prompt alone fills data.max_length",
    "equal_after_truncation": "chosen and rejected are the same once cut to data.max_length",
}
LEFT_OUT = ("tie",)  # kinds that say nothing against the row: they count towards no limit on bad rows
CUT = ("prompt_too_long", "equal_after_truncation", "nothing_learned")  # kinds that a larger data.max_length mends
BY_TEMPLATE = ("template_refused", "template_drops")  # kinds that another chat template may mend


# What is worth saying of rows that were kept; a note may name a token behind a space.
NOTES = {
    "rewritten": "the chat template renders the prompt differently once a response follows, so the prompt ends at the "
    "last token that the prompt and all dialogues share",
    "prompt_rewritten": "the chat template leaves a part of the prompt out once a response follows, so the responses "
    "stand behind the prompt as generation sees it",
    "thoughts_cut": "the chat template cuts thoughts out of a response, which is learned without them "
    "(data.keep_thoughts: refuse drops such rows)",
    "thoughts_cut_before": "the chat template cuts thoughts out of earlier turns of the prompt, as it does in use",
    "no_end": "a response has no end token, so the model does not learn to stop",
    "end_added": "the chat template ends a response with no special token, so this end token was added",
    "other_end": "a response ends with this token, which does not end the model's generation: add it to eos_token_id "
    "in the generation_config.json of the model",
    "prompt_cut": "the prompt was cut to data.max_prompt_length or data.max_length (data.truncation says at which end)",
    "turns_masked": "users' and tools' turns within a response are read and not learned (data.train_on)",
    "text_rows": "prompt and responses are text and are not put into the model's chat template "
    "(data.text: chat does that)",
}


class BadRow(Exception):  # noqa: N818 - an outcome that is counted, never an error that reaches the user
    """One row cannot become a pair; `kind` is a key of KINDS, `detail` says what stood there."""

    def __init__(self, kind: str, detail: str) -> None:
        assert kind in KINDS, kind
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Problem:
    """All rows of one source that were dropped for one reason."""

    kind: str  # a key of KINDS
    source: str  # path or Hub id as the user gave it
    count: int  # rows
    places: tuple[str, ...]  # where the first few stand, e.g. train.jsonl:17
    detail: str  # what stood in the first of them


@dataclass(frozen=True)
class DropReport:
    """What became of every row: `rows` read, `kept` as pairs, the others dropped for `problems`."""

    rows: int  # rows used at least once, before dropping
    kept: int  # rows that became pairs
    problems: tuple[Problem, ...]
    truncated: int = 0  # kept rows with a response that was cut to data.max_length
    notes: dict[str, int] = field(default_factory=dict)  # kept rows by what is worth saying of them, see NOTES
    date: str | None = None  # YYYY-MM-DD, what the chat template was told, where it asks for the date

    @property
    def dropped(self) -> int:
        """Rows that did not become pairs."""
        return self.rows - self.kept

    @property
    def bad(self) -> int:
        """Dropped rows with something wrong, which the limits on bad rows are about."""
        return self.dropped - sum(problem.count for problem in self.problems if problem.kind in LEFT_OUT)

    @property
    def bad_share(self) -> float:
        """Bad rows over rows read, 0 to 1."""
        return self.bad / self.rows if self.rows else 0.0

    @property
    def text(self) -> str:
        """What a user should know, one line per kind and source with the first places; empty if every row is whole."""
        if not (self.dropped or self.truncated or self.notes):
            return ""
        share = self.dropped / max(1, self.rows)
        lines = [f"{self.kept} of {counted(self.rows, 'row')} kept, {self.dropped} dropped ({share:.1%})"]
        for problem in self.problems:
            more = ", ..." if problem.count > len(problem.places) else ""
            lines.append(
                f"  {problem.count} {problem.kind} ({KINDS[problem.kind]}) in {problem.source}: "
                f"{', '.join(problem.places)}{more}; first: {problem.detail}"
            )
        if self.truncated:
            lines.append(f"  {self.truncated} kept rows had a response cut to data.max_length")
        for note, count in sorted(self.notes.items()):
            name, _, token = note.partition(" ")
            lines.append(f"  {count} kept rows: {name}{' ' + token if token else ''} ({NOTES[name]})")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DropReport:
        """The report that `to_json` wrote."""
        problems = tuple(Problem(**{**problem, "places": tuple(problem["places"])}) for problem in values["problems"])
        return cls(**{**values, "problems": problems})


def collect_problems(bad_rows: Iterable[tuple[str, str, str, str]]) -> tuple[Problem, ...]:
    """(source, kind, place, detail) of each bad row, counted by source and kind in order of appearance."""
    found: dict[tuple[str, str], tuple[list[str], str]] = {}
    counts: dict[tuple[str, str], int] = {}
    for source, kind, place, detail in bad_rows:
        places, _ = found.setdefault((source, kind), ([], detail))
        counts[source, kind] = counts.get((source, kind), 0) + 1
        if len(places) < PLACES_LISTED:
            places.append(place)
    return tuple(
        Problem(kind=kind, source=source, count=counts[source, kind], places=tuple(places), detail=detail)
        for (source, kind), (places, detail) in found.items()
    )


def check_report(report: DropReport, *, key: str, strict: bool, max_dropped_share: float) -> None:
    """Raises DataError if no row is left, or more were dropped than `data.strict` and the share allow."""
    if report.kept == 0:
        kinds = {problem.kind for problem in report.problems}
        remedy = (
            "Raise data.max_length, or correct the rows."
            if kinds & set(CUT)
            else "Correct the rows, or the chat template (model.chat_template)."
            if kinds & set(BY_TEMPLATE)
            else "Correct the rows."
        )
        raise DataError(f"{key}: no usable row is left.\n{report.text}\n{remedy}")
    if strict and report.bad:
        raise DataError(
            f"{key}: bad rows, and data.strict is true.\n{report.text}\n"
            "Correct the rows, or set data.strict to false to train without them."
        )
    if report.bad_share > max_dropped_share:
        raise DataError(
            f"{key}: {report.bad_share:.1%} of the rows are bad, "
            f"data.max_dropped_share allows {max_dropped_share:.1%}.\n{report.text}\n"
            "Correct the rows, or raise data.max_dropped_share to train without them."
        )
