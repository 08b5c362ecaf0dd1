"""How cost grows: with tokens, with pairs, with ranks, and (it should not) with rows that are not trained on.

python -m benchmarks.scaling [--rows 1000 10000 100000 1000000]
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.compare import raw
from benchmarks.harness.inputs import DEMO, SMALL, make_model, random_rows, same_lengths, write_rows
from benchmarks.harness.processes import Measured, Side, run_sides
from benchmarks.harness.sides import Task, available_ranks, default_dtype, ours

WARMUP = 2
TOKENS = (64, 128, 256, 512)  # of the prompt, and of each response
PAIRS = (4, 8, 16, 32)
RANKS = (1, 2)
BUDGET = 4096


def main() -> None:
    """Measure and report."""
    options = parser("scaling", "How time and memory grow.", steps=3)
    options.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="data-set sizes")
    options.add_argument("--parts", nargs="+", default=["steps", "rows"], choices=["steps", "rows"])
    options.add_argument("--dtype", default=default_dtype(), choices=["float32", "bfloat16"])
    options.add_argument("--layout", default="auto", choices=["auto", "packed", "padded"], help="data.layout")
    given = options.parse_args()
    report = Report("scaling", "How cost grows", given)
    with work_folder(given.folder) as folder:
        if "steps" in given.parts:
            steps_part(report, given, folder)
        if "rows" in given.parts:
            rows_part(report, given, folder / "rows")
    report.write()


def steps_part(report: Report, given: argparse.Namespace, folder: Path) -> None:
    """Cost of a step against tokens, pairs and ranks."""
    model = make_model(folder / "model", SMALL)
    whole = available_ranks()

    def side(name: str, *, tokens: int, pairs: int, ranks: int) -> Side:
        max_steps = WARMUP + given.rounds * given.steps
        own = folder / name.replace(" ", "-")
        own.mkdir()
        rows = random_rows(same_lengths(pairs * max_steps, tokens, tokens), SMALL.vocabulary)
        task = Task(
            model=model,
            data=write_rows(own / "train.jsonl", rows),
            folder=own,
            pairs_per_step=pairs,
            max_steps=max_steps,
            ranks=ranks,
            dtype=given.dtype,
        )
        return ours(name, task, batch={"tokens_per_micro_batch": BUDGET}, data={"layout": given.layout})

    series = {
        "tokens of prompt and of each response": {
            str(tokens): (3 * tokens * 8, side(f"{tokens} tokens", tokens=tokens, pairs=8, ranks=whole))
            for tokens in TOKENS
        },
        "pairs per step": {
            str(pairs): (pairs, side(f"{pairs} pairs", tokens=128, pairs=pairs, ranks=whole)) for pairs in PAIRS
        },
        "ranks": {
            str(ranks): (1, side(f"{ranks} ranks", tokens=128, pairs=16, ranks=ranks))
            for ranks in sorted({available_ranks(wanted) for wanted in RANKS})
        },
    }
    table = []
    for grows, points in series.items():
        sides = [one for _, one in points.values()]
        measured = run_sides(sides, rounds=given.rounds, steps=given.steps, warmup=WARMUP)
        report.measured(grows, raw(measured, None))
        sizes = [amount for amount, _ in points.values()]
        table += step_rows(grows, list(points), sizes, list(measured.values()), given.steps)
    columns = (
        "what grows",
        "to",
        "work",
        "s per step",
        "CPU s per step",
        "CPU time against the first",
        "peak MiB per rank",
    )
    report.table(Table("Cost of a step", columns, tuple(table), "Work and CPU time in multiples of the first row's."))


def step_rows(
    grows: str, points: Sequence[str], sizes: Sequence[int], measured: Sequence[Measured], steps: int
) -> list[tuple[str, ...]]:
    """One row per point of a series."""
    rows: list[tuple[str, ...]] = []
    for point, size, one in zip(points, sizes, measured, strict=True):
        ratios = [mine["cpu_s"] / first["cpu_s"] for mine, first in zip(one.turns, measured[0].turns, strict=True)]
        rows.append(
            (
                grows,
                point,
                f"{size / sizes[0]:.1f}x",
                f"{statistics.median(turn['wall_s'] for turn in one.turns) / steps:.2f}",
                f"{statistics.median(turn['cpu_s'] for turn in one.turns) / steps:.2f}",
                Spread.of(ratios).text(unit="x"),
                f"{one.memory['peak_mib']:.0f}",
            )
        )
    return rows


def rows_part(report: Report, given: argparse.Namespace, folder: Path) -> None:
    """Time and memory of a start against the size of a data set that is prepared and hardly trained on."""
    folder.mkdir(parents=True)
    model = make_model(folder / "model", DEMO)
    sides = {}
    first: dict[int, Measured] = {}
    for count in given.rows:
        own = folder / str(count)
        own.mkdir()
        task = Task(
            model=model,
            data=write_rows(own / "train.jsonl", random_rows(same_lengths(count, 8, 4), DEMO.vocabulary)),
            folder=own,
            pairs_per_step=8,
            max_steps=1 + given.steps,
            ranks=available_ranks(),
            dtype=given.dtype,
        )
        shuffled = {"layout": given.layout, "shuffle": True}
        # A budget that the smallest data set fills too: the warm-up pass, a full micro-batch, is then the same in all.
        budget = {"tokens_per_micro_batch": 512}
        sides[count] = ours(f"{count} rows", task, data=shuffled, batch=budget)
        first[count] = start(sides[count], given.steps, "first")
    later: dict[int, list[Measured]] = {count: [] for count in given.rows}
    order = random.Random(0)
    for turn in range(given.rounds):
        for count in order.sample(given.rows, len(given.rows)):
            later[count].append(start(sides[count], given.steps, f"later{turn}"))
    report.measured("first start", {str(count): raw({"start": one}, None) for count, one in first.items()})
    report.measured(
        "later starts",
        {str(count): [raw({"start": one}, None)["start"] for one in found] for count, found in later.items()},
    )
    table = tuple(start_row(count, first[count], later[count], given.steps) for count in given.rows)
    columns = ("rows", "first start, s", "later start, s", "later start, CPU s", "ms per step", "peak MiB per rank")
    note = (
        "A start is all from the command to the end of the first step; the first start also reads and tokenizes the "
        "rows, later ones find them prepared."
    )
    report.table(Table("Rows in the data set, 8 pairs per step", columns, table, note))


def start(side: Side, steps: int, name: str) -> Measured:
    """The run, alone, from its start."""
    fresh = replace(side, folder=side.folder / name)
    return run_sides([fresh], rounds=1, steps=steps, warmup=1)[side.name]


def start_row(count: int, first: Measured, later: list[Measured], steps: int) -> tuple[str, ...]:
    """One row of the table of starts."""
    starts = [one.starts[0] for one in later]
    return (
        f"{count:,}",
        f"{first.starts[0]['wall_s']:.1f}",
        Spread.of([one["wall_s"] for one in starts]).text(1),
        Spread.of([one["cpu_s"] for one in starts]).text(1),
        Spread.of([1000 * one.turns[0]["wall_s"] / steps for one in later]).text(0),
        Spread.of([one.memory["peak_mib"] for one in later]).text(0),
    )


if __name__ == "__main__":
    main()
