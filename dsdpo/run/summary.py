"""What a run says in words: its plan before it starts, its results when it is done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dsdpo.config.run import RunConfig
from dsdpo.console import counted, every, wrapped, written_time
from dsdpo.data.binning import sequence_tokens
from dsdpo.data.steps import BatchSource
from dsdpo.engine.config_remarks import json_remarks
from dsdpo.engine.deepspeed_keys import untested_deepspeed
from dsdpo.engine.optimizer_limits import optimizer_kind
from dsdpo.engine.zero_config import TRAINING_KEYS, offload_device, read_deepspeed_json, serves_both, stage
from dsdpo.run.datasets import describe_sources
from dsdpo.run.notes import run_notes
from dsdpo.run.plan import Layout, Plan
from dsdpo.run_folder import RunFolder
from dsdpo.training.cadence import Cadence
from dsdpo.training.jsonl import read_metrics

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def describe_plan(plan: Plan) -> str:
    """The plan of a run as a small table."""
    run = plan.run
    first = next(plan.training_windows(torch.device("cpu")))
    ranks = describe_ranks(plan)
    held_out = describe_sources(plan.evaluation.pairs, run.data.eval or ()) if plan.evaluation else ()
    rows = [
        ("policy", f"{describe_policy(run)}, {describe_engine(plan.policy_config)}"),
        ("reference", describe_reference(plan)),
        ("loss", run.loss.describe()),
        ("train data", describe_pairs(plan.train)),
        *(("from", line) for line in describe_sources(plan.train.pairs, run.data.train)),
        ("held-out data", describe_pairs(plan.evaluation) if plan.evaluation else "none (data.eval)"),
        *(("from", line) for line in held_out),
        *describe_samples(plan),
        ("steps", f"{plan.total_steps:,} of {counted(run.batch.pairs_per_step, 'pair')}, {ranks}"),
        (
            "first step",
            f"{counted(first.pairs, 'pair')}, {first.tokens:,} tokens, micro-batches a rank: {len(first.batches)}",
        ),
        ("layout", describe_layout(plan.layout)),
        ("checkpoints", describe_checkpoints(run)),
        ("output", run.output_dir),
        *(("note", text) for text in remarks(plan)),
    ]
    return as_table(rows)


def describe_checkpoints(run: RunConfig) -> str:
    """How often the run is saved, and whether training waits for that."""
    settings = run.checkpoint
    if not settings.every_steps:
        return "none, but where the run stops early (checkpoint.every_steps)"
    background = "in the background" + (" where host memory allows" if settings.background == "auto" else "")
    return f"{every(settings.every_steps, 'step')}, {background if settings.background else 'while training waits'}"


def as_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what there is to say of them, a line each."""
    return "\n".join(wrapped(f"{name:>14}  {text}", indent=16) for name, text in rows)


def describe_samples(plan: Plan) -> list[tuple[str, str]]:
    """Which prompts are answered as training goes, if any."""
    settings = plan.run.evaluation.samples
    if settings is None:
        return []
    how_often = Cadence.of(plan.run, plan.total_steps).sample_every
    when = every(how_often, "step") if how_often else "at the end"
    beside = " and reference" if plan.reference.has_weights and not plan.reference.before_training else ""
    text = f"policy{beside} answer {counted(len(plan.prompts), 'prompt')} of {settings.prompts} {when}"
    return [("samples", f"{text}, up to {counted(settings.max_new_tokens, 'token')} each")]


def describe_ranks(plan: Plan) -> str:
    """How many ranks there are, and which of them share rows."""
    group = plan.sequence
    ranks = counted(group.size * group.groups, "rank")
    return ranks if group.size == 1 else f"{ranks}, each {group.size} of which share every row"


def remarks(plan: Plan) -> list[str]:
    """What a user may not have meant, and what would do the same for less."""
    sync, found = plan.reference.sync, [*run_notes(plan), *deepspeed_remarks(plan)]
    if sync and sync.every >= plan.total_steps:
        found.append(
            f"reference.ref_model_sync_steps {sync.every} is not reached in {plan.total_steps} "
            "steps: the reference stays as it is"
        )
    if sync and sync.alpha == 1.0 and plan.reference.has_weights:
        found.append(
            "with reference.ref_model_mixup_alpha 1, reference.strategy policy_snapshot gives the same numbers and "
            "needs no reference weights"
        )
    return found


def deepspeed_remarks(plan: Plan) -> list[str]:
    """What the DeepSpeed JSONs do otherwise than they read."""
    run = plan.run
    raw = read_deepspeed_json(run.deepspeed)
    found = [*json_remarks(raw, run.deepspeed, learning_rate=run.optimizer.learning_rate)]
    own = run.reference.deepspeed
    if own and plan.reference.own_engine:
        theirs = read_deepspeed_json(own)
        if serves_both(theirs, raw):
            found.append(
                f"{own} is the policy's JSON too: the reference gets its stage {stage(plan.reference_config)} share of "
                "it, without optimizer, scheduler, batch sizes and gradients"
            )
        elif dropped := [key for key in TRAINING_KEYS if key in theirs]:
            found.append(f"{own}: {', '.join(dropped)} left out: a reference has no use for them")
    if (line := untested_deepspeed()) is not None:
        found.append(line)
    return found


def describe_layout(layout: Layout) -> str:
    """How batches are laid out, and why."""
    return f"padded: {layout.why_padded}" if layout.why_padded else "packed: no padding, shared beginnings once"


def describe_policy(run: RunConfig) -> str:
    """What is trained."""
    lora = run.model.lora
    adapter = "" if lora is None else f" + LoRA of rank {lora.r}" if lora.path is None else f" + adapter {lora.path}"
    bits = f", base in {run.model.quantization.describe()}" if run.model.quantization else ""
    return f"{run.model.path}{adapter} ({run.model.dtype}{bits})"


def describe_reference(plan: Plan) -> str:
    """Whose weights the reference has, and where they are."""
    engine = f": {describe_engine(plan.reference_config)}" if plan.reference.own_engine else ""
    bits = plan.reference.model.quantization if plan.reference.own_engine else None
    return plan.reference.describe() + (f", {bits.describe()}" if bits else "") + engine


def describe_engine(config: dict[str, Any]) -> str:
    """ZeRO stage and offloads of a DeepSpeed config."""
    text = f"ZeRO-{stage(config)}"
    if "optimizer" in config:
        text += f", {optimizer_kind(config)}"
    devices = {"parameters": offload_device(config, "param"), "optimizer": offload_device(config, "optimizer")}
    for name, device in devices.items():
        if device != "none":
            text += f", {name} on {device}"
    return text


def describe_pairs(windows: BatchSource) -> str:
    """Number of pairs and their tokens."""
    tokens = int(sequence_tokens(windows.pairs.lengths).sum())
    return f"{counted(len(windows.pairs), 'pair')}, {tokens:,} tokens"


def describe_results(folder: Path, *, seconds: float | None = None, counts: tuple[int, int] | None = None) -> str:
    """First and last metrics of a finished run, where everything is, and what to type next.

    `seconds` is how long it took, `counts` the number of its parameters and of those that are trained.
    """
    train, held_out = read_metrics(folder)
    lines = ["", f"{'':>20}{'first':>12}{'last':>12}"]
    for title, rows, prefix in (("train", train, ""), ("held-out", held_out, "eval/")):
        if rows:
            lines.append(f"{title:>20}{'step ' + str(rows[0]['step']):>12}{'step ' + str(rows[-1]['step']):>12}")
            ends = [(name, [row.get(prefix + name, math.nan) for row in (rows[0], rows[-1])]) for name in SHOWN]
            lines += [f"{name:>20}{first:>12.4f}{last:>12.4f}" for name, (first, last) in ends]
    if train and (skipped := train[-1].get("train/skipped_steps")):
        steps = counted(int(train[-1]["step"]), "step")
        lines += ["", f"skipped  {skipped:.0f} of {steps}, whose loss or gradient was not finite"]
    lines += ["", f"speed    {describe_speed(train)}"] if train else []
    if counts is not None:
        share = "" if counts[0] == counts[1] else f" of {counts[0]:,} ({counts[1] / max(1, counts[0]):.2%})"
        lines.append(f"trained  {counted(counts[1], 'parameter')}{share}")
    if seconds is not None:
        lines.append(f"took     {written_time(seconds)}")
    return "\n".join([*lines, "", *_paths(RunFolder(folder)), "", *_next_commands(RunFolder(folder))])


def _paths(files: RunFolder) -> list[str]:
    """Everything of interest that the run has written."""
    found = [
        ("model", files.model), ("merged", files.merged), ("saved", files.checkpoints), ("metrics", files.metrics),
        ("samples", files.samples), ("skipped", files.nonfinite), ("profile", files.profile),
    ]  # fmt: skip
    return [f"{name:<9}{path}" for name, path in found if path.exists()]


def _next_commands(files: RunFolder) -> list[str]:
    """What a user may want now."""
    commands = [f"dsdpo report {files}", f"dsdpo evaluate {files} --data FILE"]
    if (files.model / "adapter_config.json").is_file() and not files.merged.exists() and files.checkpoints.is_dir():
        commands.append(f"dsdpo export {files} --out {files}-merged --merge")
    else:
        commands.append(f"dsdpo score {files} --data FILE --out scores.parquet")
    return [f"{'next' if index == 0 else '':<9}{command}" for index, command in enumerate(commands)]


def describe_speed(train: list[dict[str, float]]) -> str:
    """Throughput of the middle training row, and the most memory that a rank held."""

    def middle(name: str) -> float:
        return median(row[name] for row in train)

    mfu = f" ({middle('perf/mfu'):.0%} of the devices' peak)" if "perf/mfu" in train[0] else ""
    return (
        f"{middle('perf/pairs_per_s'):,.1f} pairs/s, {middle('perf/tokens_per_s'):,.0f} tokens/s{mfu}, "
        f"{max(row['memory/peak_gib'] for row in train):.1f} GiB a rank at most"
    )
