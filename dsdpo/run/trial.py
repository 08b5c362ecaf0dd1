"""A trial: a few steps of a run under its DeepSpeed JSONs, for their speed and memory. Nothing is saved or exported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dsdpo.atomic import write_json
from dsdpo.config.load import check_run
from dsdpo.config.run import RunConfig
from dsdpo.data.binning import longest_sequences
from dsdpo.data.plan import epoch_order
from dsdpo.distributed import rank, values_of_ranks
from dsdpo.engine.build import device
from dsdpo.run.loop import train_until_done
from dsdpo.run.output_folder import opened_folder
from dsdpo.run.plan import Plan, plan_run
from dsdpo.run.run import build_run
from dsdpo.run.summary import read_metrics
from dsdpo.run_folder import RunFolder
from dsdpo.stop_request import StopRequest
from dsdpo.training.lost_ranks import watched_ranks
from dsdpo.training.perf import peak_memory

PEAKS = "peaks.json"  # in a trial's folder, once it is done
OOM_SCORE = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True)
class Figures:
    """What a trial took."""

    device_bytes: float  # of the rank that took most; without a GPU its host memory
    host_bytes: float  # resident memory of all ranks, at most
    seconds: float  # of a step: the median of all but the first
    pairs_per_second: float  # at that
    gathers: float  # parameters that ZeRO-3 gathered on a rank in a step


def trial_settings(
    run: RunConfig, folder: Path, *, policy: str, reference: str | None, steps: int, run_file: str | Path
) -> RunConfig:
    """The run for a few steps under these DeepSpeed JSONs, into `folder`, with everything left out that is no step.

    Raises `ConfigError` for settings that do not go together.
    """
    settings = run.model_dump(mode="json", exclude_unset=True)
    for name in ("evaluation", "checkpoint", "export", "tracking"):
        settings.pop(name, None)
    settings["data"].pop("eval", None)
    changed: dict[str, Any] = {
        "train": {"max_steps": steps},
        "evaluation": {"every_steps": 0, "at_start": False},
        "checkpoint": {"every_steps": 0},
        "tracking": {"every_steps": 1, "pairs": False, "hints": False},
        "deepspeed": policy,
        "output_dir": str(RunFolder(folder / "run")),
        "overwrite_output_dir": True,
    }
    if reference is not None:
        changed["reference"] = {"deepspeed": reference}
    if run.reference_strategy() == "precomputed":
        changed.setdefault("reference", {})["store"] = str(folder / "store")
    return check_run(settings, changed, source=run_file)


def run_trial(run: RunConfig, folder: Path, *, run_file: str | Path) -> None:
    """Take the steps of a trial, as one of its ranks; rank 0 leaves the peaks of memory in `folder`. Collective."""
    with suppress(OSError):  # where memory runs out, the kernel is to end this process, not one that compares
        OOM_SCORE.write_text("800")
    plan = plan_run(run, run_file=run_file)
    if plan.reference.before_training:
        plan = with_few_pairs(plan)
    with watched_ranks(lost_after=run.distributed.lost_after), opened_folder(plan) as (files, checkpoint, lock):
        stop = StopRequest(files, deadline=None, device=device(), lock=lock)
        built = build_run(plan, files, checkpoint, stop)
        reason = train_until_done(built)
        built.tracker.close()
        host = values_of_ranks(float(peak_memory(torch.device("cpu"))), device())
        on_gpu = device().type == "cuda"
        taken = float(torch.cuda.max_memory_reserved()) if on_gpu else host[rank()]
        most = max(values_of_ranks(taken, device()))
        if rank() == 0 and reason is None:
            write_json(folder / PEAKS, {"device": most, "host": sum(host)})


def with_few_pairs(plan: Plan) -> Plan:
    """The plan with the pairs of its steps and as many of the longest: all others need not be scored for a trial."""
    pairs = plan.train.pairs
    count = plan.total_steps * plan.run.batch.pairs_per_step
    order = epoch_order(len(pairs), seed=plan.run.train.seed, epoch=0, shuffle=plan.run.data.shuffle)
    longest = np.argsort(-longest_sequences(pairs.lengths), kind="stable")
    rows = np.unique(np.concatenate([order[:count], longest[:count]]))
    return replace(plan, train=replace(plan.train, pairs=pairs.subset(rows)))


def figures_of(folder: Path, peaks: dict[str, float]) -> Figures:
    """The figures of a trial that is done."""
    rows, _ = read_metrics(folder / "run")
    return Figures(peaks["device"], peaks["host"], *speed_of(rows[1:]))


def speed_of(rows: Sequence[dict[str, float]]) -> tuple[float, float, float]:
    """Seconds of the middle step, pairs a second at that, and gathers of a step, from its rows of metrics."""
    seconds = median(row["time/step_s"] for row in rows)
    pairs = median(row["perf/pairs_per_s"] * row["time/step_s"] for row in rows)
    return seconds, pairs / seconds, median(row["comm/gathers"] for row in rows)
