"""What a training run does beside its arithmetic, which is data, packing, metrics, logging and waiting for them.

A whole `dsdpo train` beside the same engines in a bare loop over batches made before, on two ranks and on one.

    python -m benchmarks.overhead [--model FOLDER --data FILE.jsonl]
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.compare import raw
from benchmarks.harness.processes import Measured, run_sides
from benchmarks.harness.sides import available_ranks, ours
from benchmarks.strategies import WARMUP, add_run_options, make_task, run_sections

WHOLE, BARE = "dsdpo train", "bare loop"
COLUMNS = (
    "ranks",
    "dsdpo train, s per step",
    "bare loop, s per step",
    "beside the arithmetic, by CPU time",
    "beside the arithmetic, by wall clock",
    "target",
)


def main() -> None:
    """Measure and report."""
    options = parser("overhead", "A training run beside its arithmetic alone.")
    add_run_options(options, memory=False)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    given = options.parse_args()
    report = Report("overhead", "What a run does beside its arithmetic", given)
    rows = []
    with work_folder(given.folder) as folder:
        task = make_task(given, folder)
        for ranks in sorted({available_ranks(wanted) for wanted in given.ranks}):
            own = replace(task, ranks=ranks, folder=folder / f"ranks{ranks}")
            sections = {**run_sections(given), "reference": {"strategy": "separate"}}
            sides = [
                ours(WHOLE, own, **sections),
                replace(ours(BARE, own, **sections), module="benchmarks.measured.bare"),
            ]
            measured = run_sides(sides, rounds=given.rounds, steps=given.steps, warmup=WARMUP)
            report.measured(f"{ranks} ranks", raw(measured, None))
            rows.append(row(ranks, measured, given.steps))
    note = (
        "Shares of the whole run's time, round by round: median [lowest, highest]; below 0 % where the bare loop took "
        "longer. Both loops run the engines that the command builds, on the same batches."
    )
    report.table(Table(f"{given.pairs_per_step} pairs per step, ZeRO-3", COLUMNS, tuple(rows), note))
    report.write()


def row(ranks: int, measured: dict[str, Measured], steps: int) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    whole, bare = measured[WHOLE], measured[BARE]

    def share(clock: str) -> str:
        parts = [100 * (1 - alone[clock] / all_[clock]) for all_, alone in zip(whole.turns, bare.turns, strict=True)]
        return Spread.of(parts).text(1, " %")

    seconds = [f"{statistics.median(turn['wall_s'] for turn in one.turns) / steps:.2f}" for one in (whole, bare)]
    return (str(ranks), *seconds, share("cpu_s"), share("wall_s"), "< 3 %")


if __name__ == "__main__":
    main()
