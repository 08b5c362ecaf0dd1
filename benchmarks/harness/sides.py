"""The sides of comparisons: runs of dsdpo from settings, and runs of TRL on the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.common import gpu_names
from benchmarks.harness.processes import Side

# The policy's ZeRO block, word for word the same on both sides of a comparison with TRL.
ZERO3 = {
    "stage": 3,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_bucket_size": 1000000,
    "stage3_prefetch_bucket_size": 1000000,
    "stage3_param_persistence_threshold": 10000,
}
ZERO1 = {"stage": 1, "reduce_bucket_size": 1000000}


@dataclass(frozen=True)
class Task:
    """What both sides do: the same pairs in the same order, with the same optimizer."""

    model: Path
    data: Path
    folder: Path  # of everything that is written
    pairs_per_step: int
    max_steps: int
    ranks: int = 1
    zero: dict[str, Any] = field(default_factory=lambda: dict(ZERO3))
    max_length: int = 4096
    learning_rate: float = 1e-4
    dtype: str = "float32"
    gradient_checkpointing: bool = False


def default_dtype() -> str:
    """What ordinary users compute in on this machine."""
    return "bfloat16" if gpu_names() else "float32"


def available_ranks(wanted: int = 2) -> int:
    """Ranks to start: one per GPU where there are any."""
    gpus = len(gpu_names())
    return min(wanted, gpus) if gpus else wanted


def ours(name: str, task: Task, **sections: dict[str, Any] | str | None) -> Side:
    """`dsdpo train` on the task; `sections` are laid over its settings."""
    folder = task.folder / _path(name)
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "deepspeed.json"
    policy.write_text(json.dumps({"zero_optimization": task.zero, "data_types": {"grad_accum_dtype": "fp32"}}))
    run: dict[str, Any] = {
        "model": {
            "path": str(task.model),
            "dtype": task.dtype,
            "gradient_checkpointing": task.gradient_checkpointing,
        },
        "data": {
            "train": str(task.data),
            "max_length": task.max_length,
            "shuffle": False,
            "cache_dir": str(task.folder / "cache"),
        },
        "reference": {},
        "optimizer": {"learning_rate": task.learning_rate, "lr_scheduler_type": "constant"},
        "batch": {"pairs_per_step": task.pairs_per_step},
        "train": {"max_steps": task.max_steps},
        "evaluation": {"every_steps": 0, "at_start": False},
        "checkpoint": {"every_steps": 0},
        "tracking": {"every_steps": 1},
        "deepspeed": str(policy),
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
    }
    for section, values in sections.items():
        run[section] = {**run.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return Side(name, "benchmarks.measured.ours", (str(path),), folder / "turns", ranks=task.ranks)


def theirs(
    name: str,
    task: Task,
    *,
    pairs_per_micro_batch: int,
    compact_head: bool = False,
    adapter: Path | None = None,
    **arguments: Any,
) -> Side:
    """TRL's DPOTrainer on the task; `arguments` are DPOConfig's. Under DeepSpeed where there are several ranks."""
    folder = task.folder / _path(name)
    folder.mkdir(parents=True, exist_ok=True)
    accumulation, rest = divmod(task.pairs_per_step, pairs_per_micro_batch * task.ranks)
    if rest:
        raise SystemExit(
            f"{task.pairs_per_step} pairs per step do not divide into micro-batches of {pairs_per_micro_batch} on "
            f"{task.ranks} ranks"
        )
    settings = {
        "model": str(task.model),
        "data": str(task.data),
        "dtype": task.dtype,
        "compact_head": compact_head,
        "adapter": str(adapter) if adapter else None,
        "deepspeed": task.ranks > 1,
        "arguments": {
            "output_dir": str(folder / "run"),
            "per_device_train_batch_size": pairs_per_micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": task.gradient_checkpointing,
            "max_length": task.max_length,
            "max_steps": task.max_steps,
            "learning_rate": task.learning_rate,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **arguments,
        },
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings, indent=1))
    launch = {"launcher": "accelerate", "launcher_config": _accelerate_config(task, folder)} if task.ranks > 1 else {}
    cache = {
        "HF_DATASETS_CACHE": "{folder}/cache"
    }  # of each start its own: a first run, not one that finds its results
    return Side(
        name,
        "benchmarks.measured.trl_side",
        (str(path),),
        folder / "turns",
        ranks=task.ranks,
        environment=cache,
        **launch,
    )


def _accelerate_config(task: Task, folder: Path) -> str:
    """How TRL's documentation starts DeepSpeed: a file for `accelerate launch` that names a DeepSpeed JSON."""
    config = {
        "zero_optimization": task.zero,
        "bf16": {"enabled": task.dtype == "bfloat16"},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }
    (folder / "deepspeed.json").write_text(json.dumps(config))
    launch = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "zero3_init_flag": True,
        },
        "num_processes": task.ranks,
        "num_machines": 1,
        "machine_rank": 0,
        "use_cpu": False,  # true would make accelerate drop DeepSpeed; DS_ACCELERATOR says what there is
    }
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(launch))
    return str(folder / "accelerate.yaml")


def _path(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-").lower()
