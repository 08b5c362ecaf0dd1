"""Pairs per second of `dsdpo precompute` against the bare forward passes over the same batches, on two ranks.

What the command does beside them: plan, lay out, hash and store pairs, and share the table among ranks.

    python -m benchmarks.precompute [--model FOLDER --data FILE.jsonl]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.common import ROOT, Report, Spread, Table, parser, work_folder
from benchmarks.harness.inputs import DEMO, SMALL, model_and_rows
from benchmarks.harness.processes import Running, Side
from benchmarks.harness.sides import Task, available_ranks, default_dtype, ours

COLUMNS = (
    "run", "pairs", "precompute, pairs/s", "bare forward, pairs/s", "share by CPU time", "share by wall clock", "target"
)  # fmt: skip


def main() -> None:
    """Measure and report."""
    options = parser("precompute", "dsdpo precompute against bare forward passes.", steps=1)
    options.add_argument("--model", type=Path, help="model folder; default: made on the spot")
    options.add_argument("--data", type=Path, help="JSONL file; default: made on the spot")
    options.add_argument("--pairs", type=int, default=1024, help="pairs to score")
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--score-tokens", type=int, default=8192, help="reference.score_tokens")
    options.add_argument("--tiny", action="store_true", help="a model and pairs that take no time, to try the script")
    options.add_argument("--max-length", type=int, default=512, help="data.max_length")
    options.add_argument("--dtype", default=default_dtype(), choices=["float32", "bfloat16"])
    options.add_argument("--layout", default="auto", choices=["auto", "packed", "padded"], help="data.layout")
    given = options.parse_args()
    report = Report("precompute", "Precomputing the reference's log-probs", given)
    rows = []
    with work_folder(given.folder) as folder:
        size, lengths = (DEMO, (8, 6)) if given.tiny else (SMALL, (96, 64))
        model, data = model_and_rows(
            folder, model=given.model, data=given.data, rows=given.pairs, size=size, lengths=lengths
        )
        for ranks in sorted({available_ranks(wanted) for wanted in given.ranks}):
            found = scored(given, model, data, folder / f"{ranks}", ranks)
            report.measured(f"{ranks} ranks", found)
            rows.append(row(found, ranks))
    note = (
        "Passes in turns, in random order, in the same processes; the share is bare forward's time over precompute's."
    )
    report.table(Table("ZeRO-3 reference", COLUMNS, tuple(rows), note))
    report.write()


def scored(given: argparse.Namespace, model: Path, data: Path, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank measured."""
    task = Task(
        model=model,
        data=data,
        folder=folder,
        pairs_per_step=8,
        max_steps=1,
        ranks=ranks,
        max_length=given.max_length,
        dtype=given.dtype,
    )
    reference = {
        "strategy": "precomputed",
        "deepspeed": str(ROOT / "ds_configs" / "reference" / "zero3.json"),
        "score_tokens": given.score_tokens,
        "store": str(folder / "store"),
    }
    run = ours("precompute", task, reference=reference, data={"layout": given.layout})
    side: Side = replace(
        run, module="benchmarks.measured.precompute_ranks", arguments=(str(given.rounds), *run.arguments)
    )
    running = Running(side, warmup=0, steps=0, turns=0)
    try:
        return running.finish()
    finally:
        running.stop()


def row(ranks: list[dict[str, Any]], count: int) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    rounds, pairs = len(ranks[0]["rounds"]), ranks[0]["pairs"]
    wall = {
        name: [max(rank["rounds"][index][name]["wall_s"] for rank in ranks) for index in range(rounds)]
        for name in ("precompute", "bare")
    }
    cpu = {
        name: [sum(rank["rounds"][index][name]["cpu_s"] for rank in ranks) for index in range(rounds)]
        for name in ("precompute", "bare")
    }

    def share(times: dict[str, list[float]]) -> str:
        ratios = [100 * bare / whole for bare, whole in zip(times["bare"], times["precompute"], strict=True)]
        return Spread.of(ratios).text(0, " %")

    speeds = [f"{pairs / Spread.of(wall[name]).median:.1f}" for name in ("precompute", "bare")]
    return (f"{count} ranks", str(pairs), *speeds, share(cpu), share(wall), "≥ 90 %")


if __name__ == "__main__":
    main()
