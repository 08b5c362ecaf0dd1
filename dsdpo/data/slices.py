"""Slices of a split, such as train[:1000] and train[95%:], as `datasets` writes them; for files and folders too."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"-?\d+(?:\.\d+)?%|-?\d+"
_SLICE = re.compile(rf"([\w.-]*)\[({_NUMBER})?:({_NUMBER})?\]")


@dataclass(frozen=True)
class Slice:
    """A stretch of rows: numbers of rows or percentages, negative ones from the end."""

    start: str | None
    stop: str | None

    @property
    def counts(self) -> bool:
        """Whether the number of all rows has to be known."""
        return any(end is not None and ("%" in end or end.startswith("-")) for end in (self.start, self.stop))

    def of(self, rows: int) -> range:
        """The row numbers out of so many; as in Python, what lies beyond the end is left out."""
        return range(rows)[slice(_row(self.start, rows), _row(self.stop, rows))]


def parse_slice(split: str | None) -> tuple[str | None, Slice | None]:
    """The split's name (None where only a slice is given) and its slice, if it ends with one."""
    found = _SLICE.fullmatch(split or "")
    if found is None:
        return split, None
    return found[1] or None, Slice(found[2], found[3])


def _row(end: str | None, rows: int) -> int | None:
    if end is None or not end.endswith("%"):
        return None if end is None else int(end)
    number = round(float(end[:-1]) * rows / 100)
    return number if number or not end.startswith("-") else rows  # -0.1% of few rows: none from the end
