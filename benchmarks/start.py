"""Time from the command to the end of the first step, on two ranks under ZeRO-3, and what loading has of it.

Each rank reads its own part of each weight, and what policy and reference both start from is read once; beside it
transformers' way, in which rank 0 reads every file twice and broadcasts it.

    python -m benchmarks.start [--shape 1b]
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.inputs import DEMO, LLAMA_1B, Size, model_and_rows
from benchmarks.harness.processes import Running, Side, end_with_children
from benchmarks.harness.sides import ZERO3, Task, available_ranks, default_dtype, ours

WAYS = ("transformers", "own-parts")
SHAPES = {
    "demo": DEMO,
    "110m": Size(768, 12, 16, 8, 32_000),
    "1b": replace(LLAMA_1B, vocabulary=8192),  # 0.99 billion weights
}
# Gradients are summed as they come, the update goes in parts, and few layers are whole at a time, to take less memory.
SMALL_ZERO3 = {
    **ZERO3,
    "sub_group_size": 50_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 100_000_000,
}
COLUMNS = ("part of the start", "transformers, s", "own parts, s", "transformers / own parts")


def main() -> None:
    """Measure and report."""
    options = parser("start", "From the command to the first step.", rounds=3)
    options.add_argument("--shape", default="110m", choices=SHAPES, help="of the Llama that is started")
    options.add_argument("--lora", action="store_true", help="train an adapter, where states of all weights do not fit")
    options.add_argument("--dtype", default=default_dtype(), choices=["float32", "bfloat16"])
    given = options.parse_args()
    report = Report("start", "From the command to the first step", given)
    end_with_children()
    order = random.Random(0)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with work_folder(given.folder) as folder:
        size = replace(SHAPES[given.shape], dtype=given.dtype)
        model, data = model_and_rows(folder, model=None, data=None, rows=8, size=size, lengths=(8, 6))
        gigabytes = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
        task = Task(model, data, folder, pairs_per_step=2, max_steps=1, ranks=available_ranks(), dtype=given.dtype)
        lora = {"r": 8, "target_modules": "all-linear"} if given.lora else None
        run = ours("start", task, model={"lora": lora}, reference={"strategy": "separate"})
        if given.dtype == "bfloat16":
            (folder / "start" / "deepspeed.json").write_text(json.dumps({"zero_optimization": SMALL_ZERO3}))
        for number in range(given.rounds):
            for way in order.sample(WAYS, len(WAYS)):
                found[way].append(started(run, way, folder / f"{way}-{number}"))
    report.measured("starts", found)
    rows = tuple(row(name, *(found[way] for way in WAYS)) for name in found[WAYS[0]][0])
    trained = "an adapter trained by AdamW" if given.lora else "all weights trained by AdamW"
    note = (
        f"{gigabytes:.2f} GB of weights, in the page cache, {task.ranks} ranks, {trained}; starts in turns, in "
        "random order. Parts are rank 0's."
    )
    report.table(Table("ZeRO-3 policy and separate reference of one path", COLUMNS, rows, note))
    report.write()


def started(run: Side, way: str, folder: Path) -> dict[str, float]:
    """Seconds of one start by its parts, of rank 0, and of the whole: by the clock, of the slowest rank, and of CPU."""
    side = replace(run, module="benchmarks.measured.start_ranks", arguments=(way, *run.arguments), folder=folder)
    running = Running(side, warmup=1, steps=1, turns=0)
    try:
        ranks: list[dict[str, Any]] = running.finish()
    finally:
        running.stop()
    return {
        **{name: seconds for name, [seconds] in ranks[0]["notes"].items()},
        "command to first step": max(rank["start"]["wall_s"] for rank in ranks),
        "the same, CPU time of all ranks": sum(rank["start"]["cpu_s"] for rank in ranks),
    }


def row(name: str, before: list[dict[str, float]], after: list[dict[str, float]]) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    times = [[start[name] for start in side] for side in (before, after)]
    ratios = [first / second for first, second in zip(*times, strict=True)]
    return (name, *(Spread.of(values).text() for values in times), Spread.of(ratios).text(unit="x"))


if __name__ == "__main__":
    main()
