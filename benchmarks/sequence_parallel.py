"""Runs whose rows are split over ranks beside runs whose pairs are: the largest differences over their steps.

    python -m benchmarks.sequence_parallel MODEL ROWS.jsonl [--cases separate adapter ... --stages 1 2 3 --four]

Two ranks that share every row (with `--four` also four, of which two share a row) beside two ranks with pairs of their
own, in float32 on the CPU, for each reference strategy and ZeRO stage of the policy.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Table, parser
from benchmarks.harness.inputs import first_rows
from benchmarks.harness.processes import environment, free_port

PAIRS = 8  # of a step
CASES: dict[str, dict[str, Any]] = {
    "separate": {},
    "adapter": {"model": {"lora": {"r": 8}}, "reference": {"strategy": "adapter"}},
    "precomputed": {"reference": {"strategy": "precomputed"}},
    "TR-DPO": {"reference": {"sync_ref_model": True, "ref_model_sync_steps": 6, "ref_model_mixup_alpha": 0.6}},
}
COLUMNS = ("reference", "ZeRO stage", "ranks", "ranks a row", "loss", "grad norm, relative")
LAID_OUT = tuple[str, int, int, int]  # case, stage, ranks, ranks that share a row


def main() -> None:
    """Train and compare."""
    options = parser("sequence_parallel", "Split rows beside split pairs.", rounds=1, steps=24)
    options.add_argument("model", type=Path)
    options.add_argument("rows", type=Path)
    options.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    options.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--four", action="store_true", help="also four ranks, two to a row")
    given = options.parse_args()
    os.environ.update(environment())
    report = Report("sequence_parallel", "Rows split over ranks", given)
    with tempfile.TemporaryDirectory() as folder:
        data = first_rows(given.rows, Path(folder) / "train.jsonl", PAIRS * given.steps)
        splits = [(2, 2), *([(4, 2)] if given.four else [])]
        wanted: list[LAID_OUT] = [(case, max(given.stages), 2, 1) for case in given.cases]
        wanted += [(case, stage, *split) for split in splits for case in given.cases for stage in given.stages]
        runs = {one: run_of(one, given.model.resolve(), data, Path(folder), given.steps) for one in wanted}
        for ranks in sorted({one[2] for one in wanted}):
            train_on(ranks, [run for one, run in runs.items() if one[2] == ranks])
        found = {one: rows_of(run) for one, run in runs.items()}
    rows = []
    for one in wanted:
        if one[3] > 1:
            rows.append((*map(str, one), *differences(found[one], found[(one[0], max(given.stages), 2, 1)])))
            report.measured(" ".join(map(str, one)), found[one])
    title = f"Largest differences from two ranks with pairs of their own, {given.steps} steps of {PAIRS} pairs"
    report.table(Table(title, COLUMNS, tuple(rows), "Losses start at ln 2; gradients are clipped at 1."))
    report.write()


def run_of(one: LAID_OUT, model: Path, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The settings of a run."""
    case, stage, _, split = one
    own = folder / "-".join(map(str, one))
    own.mkdir()
    (own / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero(stage)}))
    run: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(data), "shuffle": False, "cache_dir": str(own / "cache")},
        "reference": {},
        "optimizer": {"learning_rate": 1e-4, "lr_scheduler_type": "constant"},
        "batch": {"pairs_per_step": PAIRS, "tokens_per_micro_batch": 2048},
        "train": {"max_steps": steps},
        "evaluation": {"every_steps": 0, "at_start": False},
        "checkpoint": {"every_steps": 0},
        "distributed": {"sequence_parallel": split, "timeout_minutes": 60, "lost_after": "1-00:00:00"},
        "deepspeed": str(own / "deepspeed.json"),
        "output_dir": str(own / "run"),
    }
    for section, values in CASES[case].items():
        run[section] = {**run.get(section, {}), **values}
    return run


def zero(stage: int) -> dict[str, Any]:
    """The policy's ZeRO block; at stage 3 the small model's parameters are really partitioned."""
    block: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 1000000}
    if stage == 3:
        block |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000000}
    return block


def train_on(ranks: int, runs: Sequence[dict[str, Any]]) -> None:
    """All the runs, one after another, on so many ranks. Raises `RuntimeError` where one fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "transformers", "dsdpo.commands.train"])
    port = free_port()
    processes = [context.Process(target=train_here, args=(rank, ranks, port, runs)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a run on {ranks} ranks failed")


def train_here(rank: int, ranks: int, port: int, runs: Sequence[dict[str, Any]]) -> None:
    """One rank's part of the runs."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from dsdpo.commands.train import train
    from dsdpo.config.run import RunConfig
    from dsdpo.run.plan import plan_run

    for run in runs:
        train(plan_run(RunConfig.model_validate(run)))


def rows_of(run: dict[str, Any]) -> list[dict[str, float]]:
    """Loss and gradient norm of each step."""
    with (Path(run["output_dir"]) / "metrics.jsonl").open(encoding="utf-8") as lines:
        return [{name: row[name] for name in ("loss", "grad_norm")} for row in map(json.loads, lines)]


def differences(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> tuple[str, str]:
    """The largest of the losses, and of the gradient norms by their size."""
    steps = list(zip(found, expected, strict=True))
    loss = max(abs(one["loss"] - other["loss"]) for one, other in steps)
    norm = max(abs(one["grad_norm"] / other["grad_norm"] - 1) for one, other in steps)
    return f"{loss:.1e}", f"{norm:.1e}"


if __name__ == "__main__":
    main()
