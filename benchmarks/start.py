"""Time from the command to the end of the first step, on two ranks under ZeRO-3, and what loading has of it.

Each rank reads its own part of each weight, and what policy and reference both start from is read once; beside it
transformers' way, in which rank 0 reads every file twice and broadcasts it.

    python -m benchmarks.start [--hidden 2048 --layers 16]
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.inputs import DEMO, Size, model_and_rows
from benchmarks.harness.processes import Running, Side, end_with_children
from benchmarks.harness.sides import Task, available_ranks, default_dtype, ours

WAYS = ("transformers", "own-parts")
COLUMNS = ("part of the start", "transformers, s", "own parts, s", "transformers / own parts")


def main() -> None:
    """Measure and report."""
    options = parser("start", "From the command to the first step.", rounds=3)
    options.add_argument("--hidden", type=int, default=768, help="the model's hidden size")
    options.add_argument("--layers", type=int, default=12, help="the model's layers")
    options.add_argument("--tiny", action="store_true", help="a model that takes no time, to try the script")
    options.add_argument("--dtype", default=default_dtype(), choices=["float32", "bfloat16"])
    given = options.parse_args()
    report = Report("start", "From the command to the first step", given)
    end_with_children()
    order = random.Random(0)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with work_folder(given.folder) as folder:
        size = DEMO if given.tiny else Size(given.hidden, given.layers, 16, 8, 32_000, dtype=given.dtype)
        model, data = model_and_rows(folder, model=None, data=None, rows=8, size=size, lengths=(8, 6))
        gigabytes = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
        task = Task(model, data, folder, pairs_per_step=2, max_steps=1, ranks=available_ranks(), dtype=given.dtype)
        run = ours("start", task)
        for number in range(given.rounds):
            for way in order.sample(WAYS, len(WAYS)):
                found[way].append(started(run, way, folder / f"{way}-{number}"))
    report.measured("starts", found)
    rows = tuple(row(name, *(found[way] for way in WAYS)) for name in found[WAYS[0]][0])
    note = f"{gigabytes:.2f} GB of weights, in the page cache, {task.ranks} ranks; starts in turns, in random order."
    report.table(Table("ZeRO-3 policy and separate reference of one path", COLUMNS, rows, note))
    report.write()


def started(run: Side, way: str, folder: Path) -> dict[str, float]:
    """Seconds of one start, those of the slowest rank."""
    side = replace(run, module="benchmarks.measured.start_ranks", arguments=(way, *run.arguments), folder=folder)
    running = Running(side, warmup=1, steps=1, turns=0)
    try:
        ranks: list[dict[str, Any]] = running.finish()
    finally:
        running.stop()
    seconds = {name: max(rank["notes"][name][0] for rank in ranks) for name in ranks[0]["notes"]}
    whole = max(rank["start"]["wall_s"] for rank in ranks)
    return {**seconds, "all else": whole - sum(seconds.values()), "command to first step": whole}


def row(name: str, before: list[dict[str, float]], after: list[dict[str, float]]) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    times = [[start[name] for start in side] for side in (before, after)]
    ratios = [first / second for first, second in zip(*times, strict=True)]
    return (name, *(Spread.of(values).text() for values in times), Spread.of(ratios).text(unit="x"))


if __name__ == "__main__":
    main()
