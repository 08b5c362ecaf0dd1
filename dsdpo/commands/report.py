"""What a run says in words: its plan before it starts, its results when it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dsdpo.commands.prepare import Plan
from dsdpo.config.run import RunConfig
from dsdpo.data.window import Windows
from dsdpo.engine.zero_config import offload_device, stage

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def describe_plan(plan: Plan) -> str:
    """The plan of a run as a small table."""
    run = plan.run
    first = next(plan.train.steps(torch.device("cpu"), consumed_pairs=0, steps=1, **step_settings(run)))
    rows = [
        ("policy", f"{run.model.path} ({run.model.dtype}), {describe_engine(plan.policy_config)}"),
        ("reference", f"{run.reference.path or run.model.path}, {describe_engine(plan.reference_config)}"),
        ("loss", f"{run.loss.type}, beta {run.loss.beta}"),
        ("train data", describe_pairs(plan.train)),
        ("held-out data", describe_pairs(plan.evaluation) if plan.evaluation else "none (data.eval)"),
        ("steps", f"{plan.total_steps:,} of {run.batch.pairs_per_step} pairs, {plan.train.world_size} ranks"),
        ("first step", f"{first.pairs} pairs, {first.tokens:,} tokens, micro-batches a rank: {len(first.batches)}"),
        ("output", run.output_dir),
    ]
    return "\n".join(f"{name:>14}  {text}" for name, text in rows)


def step_settings(run: RunConfig) -> dict[str, Any]:
    """What decides which pairs make a step."""
    return {"pairs_per_step": run.batch.pairs_per_step, "seed": run.train.seed, "shuffle": run.data.shuffle}


def describe_engine(config: dict[str, Any]) -> str:
    """ZeRO stage and offloads of a DeepSpeed config."""
    text = f"ZeRO-{stage(config)}"
    devices = {"parameters": offload_device(config, "param"), "optimizer": offload_device(config, "optimizer")}
    for name, device in devices.items():
        if device != "none":
            text += f", {name} on {device}"
    return text


def describe_pairs(windows: Windows) -> str:
    """Number of pairs and their tokens."""
    lengths = windows.pairs.lengths
    tokens = int(lengths.sum(dtype="int64") + lengths[:, 0].sum(dtype="int64"))
    return f"{len(windows.pairs):,} pairs, {tokens:,} tokens"


def read_metrics(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The training rows and the evaluation rows of a run folder's `metrics.jsonl`, by step."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval/loss" in row]


def describe_results(folder: Path) -> str:
    """First and last metrics of a finished run, where everything is, and what to type next."""
    train, held_out = read_metrics(folder)
    lines = ["", f"{'':>20}{'first':>12}{'last':>12}"]
    for title, rows, prefix in (("train", train, ""), ("held-out", held_out, "eval/")):
        if rows:
            lines.append(f"{title:>20}{'step ' + str(rows[0]['step']):>12}{'step ' + str(rows[-1]['step']):>12}")
            lines += [f"{name:>20}{rows[0][prefix + name]:>12.4f}{rows[-1][prefix + name]:>12.4f}" for name in SHOWN]
    lines += ["", f"model    {folder / 'model'}", f"metrics  {folder / 'metrics.jsonl'}"]
    return "\n".join(lines)
