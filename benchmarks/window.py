"""Scoring a step's pairs in one pass against batch by batch: 8 micro-batches, an offloaded ZeRO-3 reference, two ranks.

python -m benchmarks.window [--model FOLDER --data FILE.jsonl]
"""

from __future__ import annotations

from benchmarks.harness.common import ROOT, Report, parser, work_folder
from benchmarks.harness.compare import Pair, pair_row, raw, report_pairs
from benchmarks.harness.processes import measure_memory, run_sides
from benchmarks.harness.sides import ours
from benchmarks.strategies import WARMUP, add_run_options, make_task

MICRO_BATCHES = 8
PAIRS_PER_MICRO_BATCH = 1


def main() -> None:
    """Measure and report."""
    options = parser("window", "The reference asked once per step against once per micro-batch.")
    add_run_options(options, pairs_per_step=16)
    given = options.parse_args()
    report = Report("window", "A step scored at once", given)
    with work_folder(given.folder) as folder:
        task = make_task(given, folder)
        pairs = given.pairs_per_step // (MICRO_BATCHES * task.ranks)
        sections = {
            "data": {"layout": given.layout},
            "batch": {"pairs_per_micro_batch": max(PAIRS_PER_MICRO_BATCH, pairs)},
        }
        offloaded = {"strategy": "separate", "deepspeed": str(ROOT / "ds_configs" / "reference" / "zero3_offload.json")}
        sides = [
            ours("batch by batch", task, reference={**offloaded, "score_tokens": 1}, **sections),
            ours("whole step", task, reference=offloaded, **sections),
        ]
        measured = run_sides(sides, rounds=given.rounds, steps=given.steps, warmup=WARMUP)
        memory = None if given.quick_memory else measure_memory(sides, steps=given.steps, warmup=WARMUP)
    report.measured("window", raw(measured, memory))
    pair = Pair(f"{MICRO_BATCHES} micro-batches a rank", "batch by batch", "whole step")
    row = pair_row(pair, measured, memory, pairs_per_turn=given.pairs_per_step * given.steps)
    report_pairs(
        report, f"{task.ranks} ranks, ZeRO-3, reference offloaded to host memory", [row], exact_memory=bool(memory)
    )
    report.write()


if __name__ == "__main__":
    main()
