"""What a run says about keys of its policy's DeepSpeed JSON: filled in where the JSON leaves them open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.engine.deepspeed_keys import Config, lookup
from dsdpo.engine.optimizer_limits import PARAMS, makes_optimizer

# DeepSpeed's schedule -> transformers' names of that shape, and the parameters that the run decides.
SCHEDULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "WarmupLR": (("constant_with_warmup", "constant"), ("warmup_min_lr", "warmup_max_lr")),
    "WarmupDecayLR": (("linear",), ("warmup_min_lr", "warmup_max_lr", "total_num_steps")),
    "WarmupCosineLR": (("cosine",), ("total_num_steps",)),
}


@dataclass(frozen=True)
class Statement:
    """What the run says about one key of the JSON."""

    key: str  # dotted, in the JSON
    value: Any  # filled in for "auto"
    run_key: str | None = None  # the setting it comes from: a different value in the JSON is then a contradiction
    if_absent: bool = True  # filled in also where the JSON leaves the key out


def precision(run: RunConfig) -> list[Statement]:
    dtype = run.model.dtype
    says = f"model.dtype {dtype}, which needs"
    return [
        Statement("bf16.enabled", dtype == "bfloat16", says),
        Statement("fp16.enabled", dtype == "float16", says),
    ]


def optimizer(config: Config, run: RunConfig) -> Iterator[Statement]:
    """Clipping, and the parameters of the optimizer block if there is one."""
    ours = run.optimizer
    yield Statement("gradient_clipping", ours.max_grad_norm, "optimizer.max_grad_norm")
    if "optimizer" not in config:
        return
    yield Statement("optimizer.params.lr", ours.learning_rate, "optimizer.learning_rate")
    yield Statement("optimizer.params.weight_decay", ours.weight_decay, "optimizer.weight_decay")
    params: dict[str, tuple[Any, str]] = {
        "betas": ([ours.adam_beta1, ours.adam_beta2], "optimizer.adam_beta1 and adam_beta2"),
        "eps": (ours.adam_epsilon, "optimizer.adam_epsilon"),
        "momentum": (ours.momentum, "optimizer.momentum"),
        "nesterov": (ours.nesterov, "optimizer.nesterov"),
        "adam_lr": (ours.learning_rate if ours.adam_learning_rate is None else ours.adam_learning_rate,
                    "optimizer.adam_learning_rate"),
    }  # fmt: skip
    kind = str(config["optimizer"].get("type")).lower()
    taken = PARAMS[ours.type] if makes_optimizer(run) else ("betas", "eps") if kind in ("adam", "adamw") else ()
    for name in taken:
        yield Statement(f"optimizer.params.{name}", *params[name])
    if kind == "lion" and not taken:
        yield Statement("optimizer.params.betas", *params["betas"], if_absent=False)


def schedule(config: Config, run: RunConfig, total_steps: int | None) -> Iterator[Statement]:
    """The parameters of the scheduler block if there is one, warm-up linear as in transformers."""
    names = SCHEDULES.get(lookup(config, "scheduler.type"), ((), ()))[1]
    known = total_steps is not None
    # DeepSpeed refuses a warm-up of 0 steps.
    warmup = max(1, run.optimizer.num_warmup_steps(total_steps or 1))
    statements = {
        "warmup_min_lr": Statement("scheduler.params.warmup_min_lr", 0),
        "warmup_max_lr": Statement(
            "scheduler.params.warmup_max_lr", run.optimizer.learning_rate, "optimizer.learning_rate"
        ),
        "total_num_steps": Statement(
            "scheduler.params.total_num_steps", total_steps or 1, "a number of steps of" if known else None
        ),
    }
    if names:
        yield Statement("scheduler.params.warmup_type", "linear")
        yield Statement("scheduler.params.warmup_num_steps", warmup, "optimizer.warmup_steps" if known else None)
    yield from (statements[name] for name in names)


def schedule_problems(config: Config, run: RunConfig, run_source: str | Path) -> Iterator[str]:
    kind, ours = lookup(config, "scheduler.type"), run.optimizer.lr_scheduler_type
    names = SCHEDULES.get(kind, ((), ()))[0]
    if names and ours not in names:
        yield (
            f"scheduler.type is {kind}, but {run_source} has optimizer.lr_scheduler_type {ours}: "
            f"set that to {names[0]}, or delete the scheduler block"
        )
    if kind is not None and run.optimizer.lr_scheduler_kwargs:
        yield (
            f"scheduler.type {kind} is DeepSpeed's schedule, on which optimizer.lr_scheduler_kwargs of {run_source} "
            "has no effect: delete the scheduler block, or leave that out"
        )


def sizes(hidden_size: int) -> list[Statement]:
    """Bucket sizes in elements, by the formulas of transformers' Trainer."""
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    return [Statement(f"zero_optimization.{name}", size, if_absent=False) for name, size in sizes.items()]
