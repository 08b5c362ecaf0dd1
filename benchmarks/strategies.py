"""What each reference strategy costs: time per step and memory, on two ranks under ZeRO-3.

python -m benchmarks.strategies [--model FOLDER --data FILE.jsonl]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.compare import raw, speedups
from benchmarks.harness.inputs import DEMO, SMALL, model_and_rows
from benchmarks.harness.processes import Measured, Side, measure_memory, run_sides
from benchmarks.harness.sides import Task, available_ranks, default_dtype, ours

WARMUP = 2
BASE = "separate"
TRDPO = "TR-DPO, sync every step"


def main() -> None:
    """Measure and report."""
    options = parser("strategies", "Time and memory of the reference strategies.")
    add_run_options(options)
    given = options.parse_args()
    report = Report("strategies", "Reference strategies", given)
    with work_folder(given.folder) as folder:
        task = make_task(given, folder)
        sides = strategy_sides(task, given)
        measured = run_sides(sides, rounds=given.rounds, steps=given.steps, warmup=WARMUP)
        memory = None if given.quick_memory else measure_memory(sides, steps=given.steps, warmup=WARMUP)
    report.measured("strategies", raw(measured, memory))
    rows = tuple(cost_row(name, measured, memory, base=BASE, steps=given.steps) for name in measured)
    title = f"{task.ranks} ranks, ZeRO-3 for policy and reference, {given.pairs_per_step} pairs per step"
    report.table(Table(title, COST_COLUMNS, rows, sync_note(measured[TRDPO], given.steps)))
    report.write()


def add_run_options(
    options: argparse.ArgumentParser, *, pairs_per_step: int = 32, tokens: int = 4096, memory: bool = True
) -> None:
    """The options of benchmarks that train on two ranks, and measure `memory`."""
    options.add_argument("--model", type=Path, help="model folder; default: made on the spot")
    options.add_argument("--data", type=Path, help="JSONL file; default: made on the spot")
    options.add_argument("--tiny", action="store_true", help="a model and pairs that take no time, to try the script")
    if memory:
        options.add_argument("--quick-memory", action="store_true", help="take memory from the timed runs: rougher")
    options.add_argument("--pairs-per-step", type=int, default=pairs_per_step, help="over all ranks")
    options.add_argument("--micro-batch-tokens", type=int, default=tokens, help="batch.tokens_per_micro_batch")
    options.add_argument("--max-length", type=int, default=512, help="data.max_length")
    options.add_argument("--dtype", default=default_dtype(), choices=["float32", "bfloat16"])
    options.add_argument("--layout", default="auto", choices=["auto", "packed", "padded"], help="data.layout")


def make_task(given: argparse.Namespace, folder: Path, *, warmup: int = WARMUP) -> Task:
    """The model, the rows and the size of a step, as the options say."""
    max_steps = warmup + given.rounds * given.steps
    size, lengths = (DEMO, (8, 6)) if given.tiny else (SMALL, (96, 64))
    model, data = model_and_rows(
        folder,
        model=given.model,
        data=given.data,
        rows=given.pairs_per_step * max_steps,
        size=size,
        lengths=lengths,
    )
    return Task(
        model=model,
        data=data,
        folder=folder,
        pairs_per_step=given.pairs_per_step,
        max_steps=max_steps,
        ranks=available_ranks(),
        max_length=given.max_length,
        dtype=given.dtype,
    )


def run_sections(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings that those options decide."""
    return {"batch": {"tokens_per_micro_batch": given.micro_batch_tokens}, "data": {"layout": given.layout}}


def strategy_sides(task: Task, given: argparse.Namespace) -> list[Side]:
    """One run per strategy; a snapshot is taken once per turn."""
    lora = {"r": 8, "lora_alpha": 16}
    every_step = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1}
    once_a_turn = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": given.steps}
    strategies: dict[str, dict[str, dict[str, Any]]] = {
        BASE: {"reference": {"strategy": "separate"}},
        "adapter (LoRA r 8)": {"model": {"lora": lora}, "reference": {"strategy": "adapter"}},
        "precomputed": {"reference": {"strategy": "precomputed"}},
        TRDPO: {"reference": {"strategy": "separate", **every_step}},
        f"policy_snapshot, sync every {given.steps} steps": {
            "reference": {"strategy": "policy_snapshot", **once_a_turn}
        },
    }
    return [ours(name, task, **run_sections(given), **sections) for name, sections in strategies.items()]


COST_COLUMNS = (
    "run",
    "s per step",
    "CPU s per step, all ranks",
    "times the first's CPU time",
    "times the first's wall clock",
    "peak MiB per rank",
    "step MiB per rank",
)


def cost_row(
    name: str, measured: dict[str, Measured], memory: dict[str, Measured] | None, *, base: str, steps: int
) -> tuple[str, ...]:
    """What a run costs, beside the base run."""
    one, first = measured[name], measured[base]
    sizes = (memory or measured)[name].memory
    return (
        name,
        f"{statistics.median(turn['wall_s'] for turn in one.turns) / steps:.2f}",
        f"{statistics.median(turn['cpu_s'] for turn in one.turns) / steps:.2f}",
        Spread.of(speedups(one, first, "cpu_s")).text(unit="x"),
        Spread.of(speedups(one, first, "wall_s")).text(unit="x"),
        f"{sizes['peak_mib']:.0f}",
        f"{sizes['step_mib']:.0f}",
    )


def sync_note(measured: Measured, steps: int) -> str:
    """What moving the reference takes of a step when it is moved after each."""
    seconds = statistics.median(measured.notes["time/last_sync_s"])
    step = statistics.median(turn["wall_s"] for turn in measured.turns) / steps
    received = max(measured.notes["reference/sync_bytes"])
    return (
        f"Runs in turns, as in vs_trl. Moving the reference (TR-DPO) takes {1000 * seconds:.1f} ms, "
        f"{100 * seconds / step:.2f} % of a step, and receives {received:.0f} bytes from other ranks."
    )


if __name__ == "__main__":
    main()
