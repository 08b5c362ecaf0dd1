"""From measured sides to rows of a table: ratios of interleaved pairs, memory, and how far the losses are apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.common import Report, Spread, Table
from benchmarks.harness.processes import Measured

COLUMNS = (
    "case",
    "A",
    "B",
    "A pairs/s",
    "B pairs/s",
    "B faster by CPU time",
    "B faster by wall clock",
    "peak MiB per rank, A / B",
    "step MiB per rank, A / B",
    "largest loss difference",
    "target",
)
NOTE = (
    "Ratios are taken per round of turns: median [lowest, highest]. CPU time is that of all ranks. Memory is the "
    "largest rank's{how}: peak of the whole process, and what a step takes on top of weights and optimizer states. The "
    "loss difference is the largest over all steps."
)


@dataclass(frozen=True)
class Pair:
    """Two sides of one case, A the baseline."""

    case: str
    a: str
    b: str
    target: str = ""


def speedups(a: Measured, b: Measured, clock: str) -> list[float]:
    """How many times faster B is, round by round; `clock` is cpu_s or wall_s."""
    return [one[clock] / other[clock] for one, other in zip(a.turns, b.turns, strict=True)]


def loss_difference(a: Measured, b: Measured) -> float:
    """The largest difference of a step's loss."""
    return max(abs(one - other) for one, other in zip(a.losses, b.losses, strict=False))


def pairs_per_s(measured: Measured, pairs_per_turn: int) -> float:
    """By wall clock, of the median turn."""
    return pairs_per_turn / statistics.median(turn["wall_s"] for turn in measured.turns)


def pair_row(
    pair: Pair, measured: Mapping[str, Measured], memory: Mapping[str, Measured] | None, *, pairs_per_turn: int
) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    a, b = measured[pair.a], measured[pair.b]
    sizes = memory or measured
    return (
        pair.case,
        pair.a,
        pair.b,
        f"{pairs_per_s(a, pairs_per_turn):.1f}",
        f"{pairs_per_s(b, pairs_per_turn):.1f}",
        Spread.of(speedups(a, b, "cpu_s")).text(unit="x"),
        Spread.of(speedups(a, b, "wall_s")).text(unit="x"),
        _sizes(sizes[pair.a].memory["peak_mib"], sizes[pair.b].memory["peak_mib"]),
        _sizes(sizes[pair.a].memory["step_mib"], sizes[pair.b].memory["step_mib"]),
        f"{loss_difference(a, b):.1e}",
        pair.target,
    )


def _sizes(a: float, b: float) -> str:
    return f"{a:.0f} / {b:.0f} ({b / a:.2f}x)" if a > 0 else f"{a:.0f} / {b:.0f}"


def report_pairs(report: Report, title: str, rows: list[tuple[str, ...]], *, exact_memory: bool) -> None:
    """The rows as a table."""
    how = "" if exact_memory else ", from the timed runs, with whatever malloc kept back"
    report.table(Table(title, COLUMNS, tuple(rows), NOTE.format(how=how)))


def raw(measured: Mapping[str, Measured], memory: Mapping[str, Measured] | None) -> dict[str, Any]:
    """Everything that was measured, for the result file."""
    found: dict[str, Any] = {name: asdict(one) for name, one in measured.items()}
    for name, one in (memory or {}).items():
        found[name]["memory_exact"] = one.memory
    return found
