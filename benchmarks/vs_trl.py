"""TRL's DPOTrainer and dsdpo side by side: the same model, pairs, order, pairs per step, precision and ZeRO settings.

One process: four shapes of random tokens on a small Llama, against TRL as it runs on a CPU, against TRL as it runs on
CUDA (where only response positions go through the head), and against dsdpo's own padded layout; then --data in steps
of 8 pairs. Two ranks: ZeRO-3 with each reference strategy, on made pairs or on --model and --data.

    pip install -c constraints.txt -e '.[bench]'; python -m benchmarks.vs_trl [--model FOLDER --data FILE.jsonl]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from benchmarks.harness.common import Report, parser, work_folder
from benchmarks.harness.compare import Pair, pair_row, raw, report_pairs
from benchmarks.harness.inputs import (
    MIDDLE,
    make_adapter,
    make_model,
    mixed_lengths,
    model_and_rows,
    random_rows,
    same_lengths,
    write_rows,
)
from benchmarks.harness.processes import Side, measure_memory, run_sides
from benchmarks.harness.sides import ZERO1, Task, available_ranks, default_dtype, ours, theirs
from dsdpo.objective.flops import Work, causal_pairs, model_flops, pair_work

WARMUP = 2
SYNC_EVERY = 4
# prompt, response, pairs per step, and the speed-ups to be shown over TRL on a CPU and over its compact head
SHAPES: dict[str, tuple[int, int, int, str, str]] = {
    "768+128": (768, 128, 2, "3", "1.7"),
    "256+256": (256, 256, 2, "1.8", "1.3"),
    "64+448": (64, 448, 2, "1.3", "1.2"),
    "mixed": (384, 160, 4, "2.8", "2"),
}
ORDINARY = 8  # pairs per step of --data in one process
STRATEGIES = ("separate", "precomputed", "LoRA", "TR-DPO")


def main() -> None:
    """Measure and report."""
    options = parser("vs_trl", "dsdpo against TRL's DPOTrainer.")
    options.add_argument(
        "--model", type=Path, help="model folder for --data and the two-rank part; default: made on the spot"
    )
    options.add_argument(
        "--data", type=Path, help="JSONL file, in one process a case of its own; default: made on the spot"
    )
    options.add_argument("--pairs-per-step", type=int, default=32, help="of the two-rank part")
    options.add_argument("--trl-micro-batch", type=int, default=4, help="TRL's per_device_train_batch_size there")
    options.add_argument(
        "--micro-batch-tokens", type=int, default=4096, help="dsdpo's batch.tokens_per_micro_batch there"
    )
    options.add_argument("--starts", type=int, default=None, help="fresh processes there; default: one per round")
    options.add_argument("--max-length", type=int, default=512, help="data.max_length of given rows")
    options.add_argument("--parts", nargs="+", default=["one", "two"], choices=["one", "two"], help="what to measure")
    options.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    options.add_argument("--quick-memory", action="store_true", help="take memory from the timed runs: rougher")
    options.add_argument("--dtype", default=default_dtype(), choices=["float32", "bfloat16"])
    given = options.parse_args()
    report = Report("vs_trl", "dsdpo beside TRL 1.16's DPOTrainer", given)
    with work_folder(given.folder) as folder:
        if "one" in given.parts:
            one_process(report, given, folder / "one")
        if "two" in given.parts:
            two_ranks(report, given, folder / "two")
    report.write()


@dataclass(frozen=True)
class Case:
    """One comparison in one process."""

    name: str
    task: Task
    targets: tuple[str, str, str]  # over TRL on a CPU, over its compact head, over our padded layout


def one_process(report: Report, given: argparse.Namespace, folder: Path) -> None:
    """Shapes of made pairs, and --data where it is given, in one process."""
    folder.mkdir(parents=True)
    cases = made_cases(given, folder)
    if given.data:
        cases.append(given_case(given, folder))
    rows = []
    for case in cases:
        sides = shape_sides(case.task)
        measured = run_sides(sides, rounds=given.rounds, steps=given.steps, warmup=WARMUP)
        memory = None if given.quick_memory else measure_memory(sides, steps=given.steps, warmup=WARMUP)
        report.measured(f"one process, {case.name}", raw(measured, memory))
        others = ("TRL on CPU", "TRL compact head", "dsdpo padded")
        for other, target in zip(others, case.targets, strict=True):
            pair = Pair(case.name, other, "dsdpo packed", target)
            rows.append(pair_row(pair, measured, memory, pairs_per_turn=case.task.pairs_per_step * given.steps))
    title = "One process: prompt + response tokens of each pair"
    report_pairs(report, title, rows, exact_memory=not given.quick_memory)


def made_cases(given: argparse.Namespace, folder: Path) -> list[Case]:
    """Pairs of random tokens in SHAPES, on a small Llama."""
    model = make_model(folder / "model", MIDDLE)
    cases = []
    for shape in given.shapes:
        prompt, response, pairs, over_cpu, over_compact = SHAPES[shape]
        max_steps = WARMUP + given.rounds * given.steps
        count = pairs * max_steps
        mixed = shape == "mixed"
        lengths = (
            mixed_lengths(count, prompt=prompt, response=response) if mixed else same_lengths(count, prompt, response)
        )
        task = Task(
            model=model,
            data=write_rows(folder / f"{shape}.jsonl", random_rows(lengths, MIDDLE.vocabulary)),
            folder=folder / shape,
            pairs_per_step=pairs,
            max_steps=max_steps,
            zero=ZERO1,
            dtype=given.dtype,
        )
        tokens, flops = token_ratio(lengths, pairs), flop_ratio(lengths, pairs, model)
        over_padded = f"≥ {0.95 * tokens:.2f}x; all arithmetic {flops:.2f}x"
        cases.append(Case(shape, task, (f"≥ {over_cpu}x", f"≥ {over_compact}x", over_padded)))
    return cases


def given_case(given: argparse.Namespace, folder: Path) -> Case:
    """The given rows, and the given model if there is one, in steps of an ordinary size."""
    own = folder / "given"
    own.mkdir()
    max_steps = WARMUP + given.rounds * given.steps
    model, data = model_and_rows(own, model=given.model, data=given.data, rows=ORDINARY * max_steps)
    task = Task(
        model=model,
        data=data,
        folder=own,
        pairs_per_step=ORDINARY,
        max_steps=max_steps,
        zero=ZERO1,
        max_length=given.max_length,
        dtype=given.dtype,
    )
    return Case(f"{given.data.name}, {ORDINARY} pairs", task, ("≥ 2.5x", "", ""))


def shape_sides(task: Task) -> list[Side]:
    """Both of TRL's ways and both of our layouts."""
    whole_step = {"pairs_per_micro_batch": task.pairs_per_step}
    stage0 = task.folder / "reference.json"
    stage0.parent.mkdir(parents=True, exist_ok=True)
    stage0.write_text('{"zero_optimization": {"stage": 0}}')
    reference = {"strategy": "separate", "deepspeed": str(stage0)}
    return [
        theirs("TRL on CPU", task, pairs_per_micro_batch=task.pairs_per_step),
        theirs("TRL compact head", task, pairs_per_micro_batch=task.pairs_per_step, compact_head=True),
        *(
            ours(f"dsdpo {layout}", task, data={"layout": layout}, batch=whole_step, reference=reference)
            for layout in ("padded", "packed")
        ),
    ]


def padded_widths(lengths: np.ndarray, pairs_per_step: int) -> np.ndarray:
    """(steps,) longest sequence of each step, to which its 2 * pairs_per_step rows are padded."""
    return (lengths[:, 0] + lengths[:, 1:].max(1)).reshape(-1, pairs_per_step).max(1)


def token_ratio(lengths: np.ndarray, pairs_per_step: int) -> float:
    """Tokens of padded steps over tokens of steps that hold each prompt once: (2P+C+R)/(P+C+R) where all are alike."""
    return float(2 * pairs_per_step * padded_widths(lengths, pairs_per_step).sum() / lengths.sum())


def flop_ratio(lengths: np.ndarray, pairs_per_step: int, model: Path) -> float:
    """The same of all arithmetic of a step: attention saves less than tokens, and the head, equal in both, nothing."""
    flops = model_flops(AutoModelForCausalLM.from_pretrained(model))
    widths = padded_widths(lengths, pairs_per_step)
    useful = pair_work(lengths)
    rows = 2 * pairs_per_step
    attended: dict[int | None, float] = {None: rows * float(causal_pairs(widths, None).sum())}
    padded = Work(float(rows * widths.sum()), attended, useful.scored)
    one, other = (2 * flops.forward(work) + flops.backward(work) for work in (padded, useful))
    return one / other


def two_ranks(report: Report, given: argparse.Namespace, folder: Path) -> None:
    """Reference strategies under ZeRO-3."""
    max_steps = WARMUP + given.rounds * given.steps
    model, data = model_and_rows(folder, model=given.model, data=given.data, rows=given.pairs_per_step * max_steps)
    adapter = make_adapter(model, folder / "adapter")
    task = Task(
        model=model,
        data=data,
        folder=folder,
        pairs_per_step=given.pairs_per_step,
        max_steps=max_steps,
        ranks=available_ranks(),
        max_length=given.max_length,
        dtype=given.dtype,
    )
    rows = []
    for strategy in given.strategies:
        task = replace(task, folder=folder / strategy, learning_rate=1e-3 if strategy == "LoRA" else 1e-4)
        sides = strategy_sides(strategy, task, given, adapter)
        starts = given.starts or given.rounds
        measured = run_sides(sides, rounds=given.rounds, steps=given.steps, warmup=WARMUP, starts=starts)
        memory = None if given.quick_memory else measure_memory(sides, steps=given.steps, warmup=WARMUP)
        report.measured(f"{task.ranks} ranks, {strategy}", raw(measured, memory))
        pair = Pair(strategy, "TRL", "dsdpo", "≥ 2.5x, memory no higher")
        rows.append(pair_row(pair, measured, memory, pairs_per_turn=given.pairs_per_step * given.steps))
    on = "given model and pairs" if given.model else "made model and pairs"
    title = f"{task.ranks} ranks, ZeRO-3, {given.pairs_per_step} pairs per step, {on}"
    report_pairs(report, title, rows, exact_memory=not given.quick_memory)


def strategy_sides(strategy: str, task: Task, given: argparse.Namespace, adapter: Path) -> list[Side]:
    """TRL and dsdpo with the same reference strategy."""
    trl: dict[str, dict[str, Any]] = {
        "separate": {},
        "precomputed": {"precompute_ref_log_probs": True},
        "LoRA": {"adapter": adapter},
        "TR-DPO": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": SYNC_EVERY},
    }
    dsdpo: dict[str, dict[str, dict[str, Any]]] = {
        "separate": {"reference": {"strategy": "separate"}},
        "precomputed": {"reference": {"strategy": "precomputed"}},
        "LoRA": {"model": {"lora": {"path": str(adapter)}}, "reference": {"strategy": "adapter", "adapter": "base"}},
        "TR-DPO": {"reference": {"strategy": "separate", **trl["TR-DPO"]}},
    }
    budget = {"tokens_per_micro_batch": given.micro_batch_tokens}
    return [
        theirs("TRL", task, pairs_per_micro_batch=given.trl_micro_batch, **trl[strategy]),
        ours("dsdpo", task, batch=budget, **dsdpo[strategy]),
    ]


if __name__ == "__main__":
    main()
