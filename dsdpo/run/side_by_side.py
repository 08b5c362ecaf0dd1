"""Runs that have been, side by side: the settings in which they differ, how they ended, their speed and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from dsdpo.run.series import RunSeries, differences
from dsdpo.training.jsonl import without_nan

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
WIDEST, NARROWEST = 48, 16  # characters of a column; longer settings lose their beginning
Column = list[Any]


def comparison(runs: Sequence[RunSeries]) -> dict[str, dict[str, Column]]:
    """What there is to compare, by section and name: a value for each run, None where it has none."""
    found: dict[str, dict[str, Column]] = {
        "settings that differ": dict(differences(runs)),
        "train, last step": {name: [last(run.train, name) for run in runs] for name in ("step", *METRICS)},
        "held-out, last": {name: [last(run.evaluations, _held_out(name)) for run in runs]
                           for name in ("step", *METRICS)},
        "speed, middle of the rows": {
            name: [of_rows(run.train, name, median) for run in runs]
            for name in ("time/step_s", "perf/pairs_per_s", "perf/tokens_per_s", "perf/mfu", "comm/gathers")
        },
        "memory, most": {"memory/peak_gib": [of_rows(run.train, "memory/peak_gib", max) for run in runs]},
    }  # fmt: skip
    return {
        section: kept
        for section, rows in found.items()
        if (kept := {name: values for name, values in rows.items() if any(value is not None for value in values)})
    }


def last(rows: Sequence[dict[str, float]], name: str) -> float | None:
    """The metric in the newest row that has it."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def of_rows(rows: Sequence[dict[str, float]], name: str, choose: Callable[[Sequence[float]], float]) -> float | None:
    """The middle or the largest of a metric in all rows but the first, which is often slower."""
    values = [row[name] for row in rows[1:] or rows if name in row and math.isfinite(row[name])]
    return choose(values) if values else None


def table(runs: Sequence[RunSeries], *, width: int | None = None) -> str:
    """A column for each run, a line for each thing to compare; at most `width` characters wide if it can be."""
    sections = comparison(runs)
    names = max((len(f"  {name}") for rows in sections.values() for name in rows), default=0)
    names = max(names, 0, *map(len, sections))
    widest = WIDEST if width is None else max(NARROWEST, min(WIDEST, (width - names) // len(runs) - 2))
    lines: list[tuple[str, ...]] = [("", *(shown(run.name, widest) for run in runs))]
    for section, rows in sections.items():
        lines += [("",), (section,)]
        lines += [(f"  {name}", *(shown(value, widest) for value in values)) for name, values in rows.items()]
    widths = [max(len(line[at]) for line in lines if at < len(line)) for at in range(len(runs) + 1)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )


def as_json(runs: Sequence[RunSeries]) -> dict[str, Any]:
    """The same with a run's folder for its name, and null for what is not finite."""
    return {"runs": [str(run.folder) for run in runs], **without_nan(comparison(runs))}


def shown(value: Any, widest: int = WIDEST) -> str:
    """A value as the table has it: settings as YAML writes them, of a list of sources the paths."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = ", ".join(str(each.get("path", each)) for each in value)
    text = {None: "-", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = str(value) if text is None else text
    return text if len(text) <= widest else f"...{text[3 - widest :]}"


def _held_out(name: str) -> str:
    return name if name == "step" else f"eval/{name}"
