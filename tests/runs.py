"""Whole runs for tests, small enough to finish in seconds, on real ranks and through the command's own code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks

# On tiny models DeepSpeed would otherwise keep every parameter gathered and test nothing.
ALWAYS_GATHER = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "reduce_bucket_size": 10000,
}
CPU = {"device": "cpu", "pin_memory": False}
POLICIES: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 10000}},
    "zero2": {"zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 10000}},
    "zero3": {"zero_optimization": {"stage": 3, "overlap_comm": False, **ALWAYS_GATHER}},
    "zero3_offload": {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "offload_optimizer": CPU,
            "offload_param": CPU,
            **ALWAYS_GATHER,
        }
    },
}
# Not among those that whole matrices of tests go through.
OFFLOADED: dict[str, dict[str, Any]] = {
    f"zero{stage}_offload": {
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": 10000,
            "offload_optimizer": CPU,
        }
    }
    for stage in (1, 2)
}
REFERENCES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero3": {"zero_optimization": {"stage": 3, **ALWAYS_GATHER}},
    "zero3_offload": {"zero_optimization": {"stage": 3, "offload_param": CPU, **ALWAYS_GATHER}},
}


def demo_inputs(folder: Path) -> Path:
    """The demo's model, tokenizer and rows in `folder`; `few.jsonl` has the first held-out rows."""
    from dsdpo.commands.demo import make_inputs

    make_inputs(folder)
    held_out = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(held_out[:6]))
    return folder


def settings(
    folder: Path,
    inputs: Path,
    *,
    policy_zero: str = "zero3",
    reference_zero: str | None = "zero3",
    **sections: dict[str, Any],
) -> dict[str, Any]:
    """A run of 4 steps of 8 pairs over `inputs` (see `demo_inputs`), written to `folder / "run"`.

    `sections` are laid over the defaults, setting by setting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {
        "model": {"path": str(inputs / "model"), "dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": str(inputs / "train.jsonl"), "max_length": 64, "cache_dir": str(inputs / "cache")},
        "reference": {},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"pairs_per_step": 8, "pairs_per_micro_batch": 2},
        "train": {"max_steps": 4},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "deepspeed": write_json(folder / "policy.json", {**POLICIES, **OFFLOADED}[policy_zero]),
        "output_dir": str(folder / "run"),
    }
    if reference_zero is not None:
        run["reference"]["deepspeed"] = write_json(folder / "reference.json", REFERENCES[reference_zero])
    for name, values in sections.items():
        run[name] = {**run.get(name, {}), **values} if isinstance(values, dict) else values
    return run


def write_json(path: Path, content: dict[str, Any]) -> str:
    """Write the file; its path as text."""
    path.write_text(json.dumps(content))
    return str(path)


def each_once(names: Iterable[str], others: Iterable[str], *, whole: str) -> list[tuple[str, str]]:
    """Pairs for engines that meet only in shared settings: `whole` beside each of `others`, every other name once."""
    others = list(others)
    rest = [name for name in names if name != whole]
    return [(whole, other) for other in others] + [(name, others[i % len(others)]) for i, name in enumerate(rest)]


def train_on(world_size: int, run: dict[str, Any]) -> list[dict[str, float]]:
    """Train on real ranks; the rows of metrics.jsonl."""
    run_ranks(world_size, train_here, run)
    return metrics(Path(run["output_dir"]))


def train_here(run: dict[str, Any]) -> None:
    """Train in this process, as one of the ranks that are there."""
    from dsdpo.commands.train import train
    from dsdpo.config.run import RunConfig
    from dsdpo.run.plan import plan_run

    train(plan_run(RunConfig.model_validate(run)))


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, float]]) -> list[float]:
    """The training losses, step by step."""
    return [row["loss"] for row in rows if "loss" in row]


def write_other_model(folder: Path) -> None:
    """Other random weights of the same shape, in place."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
