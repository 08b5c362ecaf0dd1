"""What a save costs training: at once and in the background, on the same run, in turns within the same processes.

    python -m benchmarks.saves [--output-dir FOLDER_ON_THE_DISK_TO_MEASURE]

A stall is what training waits for: of a save at once all of it, of one in the background the copy into host memory, the
agreement at the end, and what was not written yet after `--steps` steps.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.inputs import DEMO, MIDDLE, model_and_rows
from benchmarks.harness.processes import Running
from benchmarks.harness.sides import Task, available_ranks, default_dtype, ours

COLUMNS = (
    "ranks", "at once, s", "background, s", "of it copying, s", "stall, background over at once", "written in, s",
    "step while writing over step without, wall clock", "the same, CPU time of the training thread",
    "copies, MiB a rank",
)  # fmt: skip


def main() -> None:
    """Measure and report."""
    options = parser("saves", "Stalls of saves at once and in the background.", steps=12)
    options.add_argument("--model", type=Path, help="model folder; default: made on the spot")
    options.add_argument("--data", type=Path, help="JSONL file; default: made on the spot")
    options.add_argument("--ranks", type=int, nargs="+", default=[1])
    options.add_argument("--pairs-per-step", type=int, default=8)
    options.add_argument("--output-dir", type=Path, help="folder on the disk to measure; default: where inputs are")
    options.add_argument("--tiny", action="store_true", help="a model and pairs that take no time, to try the script")
    given = options.parse_args()
    report = Report("saves", "Saves at once and in the background", given)
    rows = []
    with work_folder(given.folder) as folder:
        size, lengths = (DEMO, (8, 6)) if given.tiny else (MIDDLE, (96, 64))
        count = (given.rounds + 1) * 3 * given.steps * given.pairs_per_step
        model, data = model_and_rows(
            folder, model=given.model, data=given.data, rows=min(count, 512), size=size, lengths=lengths
        )
        for ranks in sorted({available_ranks(wanted) for wanted in given.ranks}):
            found = measured(given, model, data, folder / f"{ranks}", ranks)
            report.measured(f"{ranks} ranks", found)
            rows.append(row(found, ranks))
    note = (
        "Median [lowest, highest] of rounds, each with a save at once, one in the background and steps without one, in "
        "random order; times of the slowest rank, ratios within a round. ZeRO-2, float32, one reference; everything is "
        "flushed to the disk. A step counts as one while writing if the files were not written when it ended. Copies "
        "are what is held for them after the first save, and what the run says that they take."
    )
    report.table(Table("A run that saves while it trains", COLUMNS, tuple(rows), note))
    report.write()


def measured(given: argparse.Namespace, model: Path, data: Path, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank measured."""
    task = Task(
        model=model,
        data=data,
        folder=folder,
        pairs_per_step=given.pairs_per_step,
        max_steps=(given.rounds + 1) * 3 * given.steps,
        ranks=ranks,
        zero={"stage": 2, "overlap_comm": False},
        dtype=default_dtype(),
    )
    output = {"output_dir": str(given.output_dir / f"run-{ranks}")} if given.output_dir else {}
    run = ours("saves", task, **output)
    arguments = (str(given.rounds), str(given.steps), *run.arguments)
    running = Running(
        replace(run, module="benchmarks.measured.save_ranks", arguments=arguments), warmup=0, steps=0, turns=0
    )
    try:
        return running.finish()
    finally:
        running.stop()


def row(ranks: list[dict[str, Any]], count: int) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    rounds = [[rank["rounds"][index] for rank in ranks] for index in range(len(ranks[0]["rounds"]) - 1)]
    memory = [rank["rounds"][-1]["memory"] for rank in ranks]

    def slowest(kind: str, *names: str) -> list[float]:
        found = []
        for of_ranks in rounds:
            values = [rank[kind] for rank in of_ranks]
            for name in names:
                values = [value[name] for value in values]
            found.append(max(values))
        return found

    def slowdown(clock: str) -> str:
        ratios = []
        for of_ranks in rounds:
            beside, without = ([step[clock] for step in of_ranks[0][kind]["steps"]] for kind in ("background", "none"))
            ratios += [statistics.mean(beside) / statistics.mean(without)] if beside else []
        return Spread.of(ratios).text(3, "x") if ratios else "written within a step"

    at_once, behind = slowest("at once", "stall", "wall_s"), slowest("background", "stall", "wall_s")
    ratios = [ours / theirs for ours, theirs in zip(behind, at_once, strict=True)]
    held, said = (max(rank[name] for rank in memory) for name in ("held_mib", "said_mib"))
    return (
        str(count),
        Spread.of(at_once).text(),
        Spread.of(behind).text(),
        Spread.of(slowest("background", "copy", "wall_s")).text(),
        Spread.of(ratios).text(2, "x"),
        Spread.of(slowest("background", "writing_s")).text(),
        slowdown("wall_s"),
        slowdown("cpu_s"),
        f"{held:.0f}, said {said:.0f}",
    )


if __name__ == "__main__":
    main()
