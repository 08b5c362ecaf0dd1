"""What became of the rows that were read: kept, dropped by kind, cut; readable, and stored beside the pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dsdpo.errors import DataError

PLACES_LISTED = 5

KINDS = {
    "invalid_json": "not valid JSON",
    "missing_field": "a field is missing",
    "empty_field": "a field is empty",
    "wrong_type": "a field has the wrong type",
    "no_common_prompt": "no prompt given, and the two dialogues have no common beginning",
    "equal_responses": "chosen and rejected are the same",
    "not_by_assistant": "the last message of a response is not by the assistant",
    "template_refused": "the chat template refuses the messages",
    "empty_prompt": "the prompt has no tokens",
    "empty_response": "a response has no tokens",
    "prompt_too_long": "the prompt alone fills data.max_length",
    "equal_after_truncation": "chosen and rejected are the same once cut to data.max_length",
}
CUT = ("prompt_too_long", "equal_after_truncation")  # kinds that a larger data.max_length mends


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
    rewritten: int = 0  # kept rows whose template renders the prompt differently once a response follows

    @property
    def dropped(self) -> int:
        """Rows that did not become pairs."""
        return self.rows - self.kept

    @property
    def dropped_share(self) -> float:
        """Dropped rows over rows read, 0 to 1."""
        return self.dropped / self.rows if self.rows else 0.0

    @property
    def text(self) -> str:
        """What a user should know, one line per kind and source with the first places; empty if every row is whole."""
        if not (self.dropped or self.truncated or self.rewritten):
            return ""
        lines = [f"{self.kept} of {self.rows} rows kept, {self.dropped} dropped ({self.dropped_share:.1%})"]
        for problem in self.problems:
            more = ", ..." if problem.count > len(problem.places) else ""
            lines.append(
                f"  {problem.count} {problem.kind} ({KINDS[problem.kind]}) in {problem.source}: "
                f"{', '.join(problem.places)}{more}; first: {problem.detail}"
            )
        if self.truncated:
            lines.append(f"  {self.truncated} kept rows had a response cut to data.max_length")
        if self.rewritten:
            lines.append(
                f"  {self.rewritten} kept rows: the chat template renders the prompt differently once a response "
                "follows, so the prompt ends at the last token that prompt and both dialogues share"
            )
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
        cut = any(problem.kind in CUT for problem in report.problems)
        remedy = "Raise data.max_length, or correct the rows." if cut else "Correct the rows."
        raise DataError(f"{key}: no usable row is left.\n{report.text}\n{remedy}")
    if strict and report.dropped:
        raise DataError(
            f"{key}: bad rows, and data.strict is true.\n{report.text}\n"
            "Correct the rows, or set data.strict to false to train without them."
        )
    if report.dropped_share > max_dropped_share:
        raise DataError(
            f"{key}: {report.dropped_share:.1%} of the rows are bad, "
            f"data.max_dropped_share allows {max_dropped_share:.1%}.\n{report.text}\n"
            "Correct the rows, or raise data.max_dropped_share to train without them."
        )
