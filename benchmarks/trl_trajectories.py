"""Trajectories of TRL's DPOTrainer on a small model, and ours beside them, step by step.

    python -m benchmarks.trl_trajectories make MODEL ROWS.jsonl --out FOLDER [--only NAME ...]
    python -m benchmarks.trl_trajectories compare MODEL ROWS.jsonl --out FOLDER [--ranks 1 2] [--result FILE.json]

`make` runs TRL in one process on the CPU in float32: no dropout, nothing truncated, no shuffling (step s trains on rows
[8s, 8s + 8) of the file, in one micro-batch), AdamW without weight decay, a linear schedule with 4 warm-up steps.
`compare` trains the same with dsdpo under ZeRO-3 and says the largest relative difference of each metric, over all
steps; `--result` keeps that as a result of the benchmarks. What lies in FOLDER complete is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Table

STEPS, PAIRS, RATE, WARMUP = 24, 8, 1e-4, 4
MPO = {"type": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]}
CASES: dict[str, dict[str, Any]] = {
    "apo_zero": {"type": "apo_zero"},
    "robust": {"type": "robust", "label_smoothing": 0.1},
    "sigmoid_norm": {"type": "sigmoid_norm", "beta": 5.0},
    "sigmoid_sft": {"type": ["sigmoid", "sft"]},
    "mpo": MPO,
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "wpo": {"use_weighting": True},
    "ld_dpo": {"ld_alpha": 0.5},
    "aot": {"type": "aot"},
    "aot_unpaired": {"type": "aot_unpaired", "label_smoothing": 0.1},
}
"""dsdpo's loss section; TRL's options have the same names but for these two."""
TRL_NAMES = {"type": "loss_type", "weights": "loss_weights"}
COMPARED = ("loss", "grad_norm", "logps/chosen", "logps/rejected")


def make(name: str, model: str, rows: Path, out: Path) -> None:
    """Run TRL and write its steps to `out`/NAME.json."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    loss = {TRL_NAMES.get(key, key): value for key, value in CASES[name].items()}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(out / f"{name}-trl"),
            learning_rate=RATE,
            warmup_steps=WARMUP,
            lr_scheduler_type="linear",
            max_steps=STEPS,
            per_device_train_batch_size=PAIRS,
            max_length=None,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **loss,
        ),
        train_dataset=load_dataset("json", data_files=str(rows), split="train"),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    made_with = {package: version(package) for package in ("torch", "transformers", "trl", "accelerate")}
    content = {"made_with": made_with, "settings": {**CASES[name], "lr": RATE}, "steps": steps}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def ours(name: str, model: str, rows: Path, out: Path, *, ranks: int) -> list[dict[str, float]]:
    """The same with dsdpo on some ranks under ZeRO-3; its rows of metrics."""
    folder = out / f"{name}-{ranks}"
    if len(done := rows_of(folder)) == STEPS:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.json").write_text(json.dumps(zero))
    run = {
        "model": {"path": model, "dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": str(rows), "shuffle": False, "max_length": 4096, "cache_dir": str(out / "cache")},
        "loss": CASES[name],
        "optimizer": {"learning_rate": RATE, "warmup_steps": WARMUP},
        "batch": {"pairs_per_step": PAIRS, "pairs_per_micro_batch": PAIRS // 2},
        "train": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 0},
        "deepspeed": str(folder / "zero3.json"),
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
    }
    (folder / "run.json").write_text(json.dumps(run))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable] if ranks == 1 else command
    subprocess.run([*command, "-m", "dsdpo", "train", str(folder / "run.json")], check=True, stdout=subprocess.DEVNULL)
    return rows_of(folder)


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The training rows of a run in `folder`, none where there is none."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def largest_difference(found: list[dict[str, float]], expected: list[dict[str, float]], metric: str) -> float:
    """Of all steps, relative to TRL's value."""
    pairs = [(row[metric], step[metric]) for row, step in zip(found, expected, strict=True)]
    return max(abs(mine - theirs) / max(abs(theirs), 1e-6) for mine, theirs in pairs)


def first_rows(rows: Path, out: Path) -> Path:
    """The rows that are trained on, in a file of their own."""
    path = out / "rows.jsonl"
    path.write_text("".join(rows.read_text().splitlines(keepends=True)[: STEPS * PAIRS]))
    return path


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "compare"))
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--result", type=Path, help="file for the result of compare, e.g. in results/")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = first_rows(given.rows, given.out)
    found_all: dict[str, dict[str, float]] = {}
    for name in given.only:
        if given.action == "make":
            if not (given.out / f"{name}.json").exists():
                make(name, given.model, rows, given.out)
            continue
        expected = json.loads((given.out / f"{name}.json").read_text())["steps"]
        for ranks in given.ranks:
            found = ours(name, given.model, rows, given.out, ranks=ranks)
            differences = {metric: largest_difference(found, expected, metric) for metric in COMPARED}
            text = ", ".join(f"{metric} {value:.1e}" for metric, value in differences.items())
            print(f"{name} on {ranks} rank{'s' if ranks > 1 else ''}, {len(found)} steps: {text}", flush=True)
            found_all[f"{name}, {ranks}"] = differences
    if given.result is not None:
        keep(found_all, given)


def keep(found: dict[str, dict[str, float]], given: argparse.Namespace) -> None:
    """Write the differences as a result of the benchmarks."""
    options = argparse.Namespace(out=given.result, steps=STEPS, pairs_per_step=PAIRS, learning_rate=RATE)
    report = Report("trl_trajectories", "Trajectories of TRL's DPOTrainer", options)
    rows = tuple((name, *(f"{values[metric]:.1e}" for metric in COMPARED)) for name, values in found.items())
    note = (
        f"{STEPS} steps of {PAIRS} pairs in float32, ours under ZeRO-3, four pairs a micro-batch. forward_kl and "
        "alpha_divergence take exponentials of differences of float32 sums: benchmarks.trl_rounding has whose rounding "
        "it is."
    )
    report.table(Table("Largest relative difference of any step", ("loss, ranks", *COMPARED), rows, note))
    report.measured("differences", found)
    report.write()


if __name__ == "__main__":
    main()
