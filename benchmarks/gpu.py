"""Models of 1B and 8B on one GPU: pairs/s, MFU and memory, packed and padded, beside TRL's DPOTrainer.

Real shapes with random weights, pairs with the lengths of UltraFeedback, HH-RLHF and Tülu 3's HelpSteer, bfloat16. Each
case is held against the shortest step that this device's measured peak allows. MFU counts what the formulas ask for
(dsdpo/objective/flops.py) against the data sheet's peak. Sides run one after another, as two do not fit the device.

    python -m benchmarks.gpu [--cases 1b 8b-lora] [--mixes ultrafeedback hh helpsteer] [--sides compiled dsdpo]
    python -m benchmarks.gpu --minutes 8                           what can be measured in eight minutes
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_peak import measured_peak
from benchmarks.harness.common import Report, Spread, Table, gpu_names, machine, parser, work_folder
from benchmarks.harness.compare import raw, speedups
from benchmarks.harness.inputs import (
    DEMO,
    LLAMA_1B,
    LLAMA_8B,
    Size,
    make_adapter,
    make_model,
    mixed_lengths,
    random_rows,
    write_rows,
)
from benchmarks.harness.processes import Measured, Side, run_sides
from benchmarks.harness.roofline import Floor, Peak, floor_of_step
from benchmarks.harness.sides import Task, default_dtype, ours, theirs
from dsdpo.training.perf import peak_tflops

WARMUP = 2
# Median tokens of prompt and of each response, spread, from the medians in arXiv 2410.20305.
MIXES = {"ultrafeedback": (71, 169, 0.6), "hh": (96, 45, 0.6), "helpsteer": (589, 93, 0.6)}
LONGEST = 2048
PACKED, PADDED, TRL = "dsdpo", "dsdpo padded", "TRL"
# dsdpo with one thing that a run can choose, as the settings of its sections.
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "compiled": {"model": {"torch_compile": True}},
    "Liger": {"model": {"use_liger_kernel": True}},
    "fused head": {"model": {"output_head": "fused"}},
    "fp8 reference": {"reference": {"strategy": "separate", "quantization": {"bits": 8}}},
}
SIDES = [PACKED, PADDED, TRL, *CHOICES]
COLUMNS = ("case", "side", "pairs/s", "times TRL", "MFU", "of the shortest step", "peak GiB", "beside the models")


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    size: Size
    zero: dict[str, Any]
    lora: bool = False
    offloaded: bool = False
    tokens: int = 16_384  # of a micro-batch
    host_gib: float = 24.0  # that its run takes of host memory, by dsdpo estimate


CASES = {
    "1b": Case(LLAMA_1B, {"stage": 2, "overlap_comm": False}),
    "8b-lora": Case(LLAMA_8B, {"stage": 2, "overlap_comm": False}, lora=True),
    "8b-offload": Case(
        LLAMA_8B,
        {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"}},
        offloaded=True,
        host_gib=200.0,
    ),
}
TINY = Case(replace(DEMO, dtype="float32"), {"stage": 2, "overlap_comm": False}, tokens=256, host_gib=0.0)


def main() -> None:
    """Measure and report."""
    options = parser("gpu", "1B and 8B models on one GPU.", rounds=3, steps=2)
    options.add_argument("--cases", nargs="+", default=["1b", "8b-lora"], choices=list(CASES))
    options.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    options.add_argument("--sides", nargs="+", default=[PACKED, PADDED, TRL], choices=SIDES)
    options.add_argument("--pairs-per-step", type=int, default=64)
    options.add_argument("--trl-micro-batch", type=int, default=8, help="TRL's per_device_train_batch_size")
    options.add_argument("--minutes", type=float, default=None, help="begin no side that may end after so many")
    options.add_argument("--tiny", action="store_true", help="a model that takes no time, to try the script")
    given = options.parse_args()
    if not gpu_names() and not given.tiny:
        raise SystemExit("benchmarks.gpu: no CUDA device here; --tiny tries the script on a CPU")
    if TRL in given.sides and find_spec("trl") is None:
        print("TRL is not installed: without it (pip install -c constraints.txt -e '.[bench]')")
        given.sides.remove(TRL)
    report, budget = Report("gpu", "On one GPU", given), Budget(given.minutes)
    with work_folder(given.folder) as folder:
        peak = measured_peak(folder)
        report.measured("peak", vars(peak))
        models: dict[str, Path] = {}
        for mix in given.mixes:  # the first one of every case before the second
            for name in given.cases:
                case = replace(TINY, lora=CASES[name].lora) if given.tiny else CASES[name]
                if case.host_gib > machine()["ram_gib"]:
                    print(f"{name} needs {case.host_gib:.0f} GiB of host memory, and here are {machine()['ram_gib']}")
                    continue
                models[name] = models.get(name) or make_model(folder / f"model-{name}", case.size)
                measured = measure(case, given, models[name], mix, folder / f"{name}-{mix}", budget)
                report.measured(f"{name}, {mix}", raw(measured, None))
                if rows := case_rows(f"{name}, {mix}", case, given, measured, peak):
                    title = f"{name}, {mix}, {given.pairs_per_step} pairs per step"
                    report.table(Table(title, COLUMNS, tuple(rows), NOTE))
                report.write()


@dataclass
class Budget:
    """The minutes there are, and how long the longest side has taken so far."""

    minutes: float | None
    longest_s: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        """Seconds to go."""
        return 60 * (self.minutes or float("inf")) - (time.monotonic() - self.began)


NOTE = (
    "Median [lowest, highest] of rounds. MFU is of the data sheet's peak, the share of the shortest "
    "step of the measured one. TRL's MFU follows from dsdpo's by the times of the same pairs. The last column is the "
    "share of dsdpo's step outside of both models' passes: data, optimizer, metrics, waits."
)


def measure(
    case: Case, given: argparse.Namespace, model: Path, mix: str, folder: Path, budget: Budget
) -> dict[str, Measured]:
    """What the sides of a case report, one after another; of one that fails or does not end, why is printed."""
    task = make_task(case, given, model, mix, folder)
    adapter = make_adapter(model, folder / "adapter", rank=16) if case.lora else None
    measured = {}
    for name in given.sides:
        if case.lora and name == "compiled":  # which do not go together
            continue
        left = budget.left_s()
        if left < budget.longest_s:
            print(f"no time left for {name} of {mix}", flush=True)
            continue
        side = make_side(name, case, task, given, adapter)
        limited = replace(side, limit_s=None if budget.minutes is None else left)
        began = time.monotonic()
        try:
            measured |= run_sides([limited], rounds=given.rounds, steps=given.steps, warmup=WARMUP)
        except RuntimeError as error:
            print(f"{mix}: {error}", flush=True)
        budget.longest_s = max(budget.longest_s, time.monotonic() - began)
    return measured


def make_task(case: Case, given: argparse.Namespace, model: Path, mix: str, folder: Path) -> Task:
    """A case's model and pairs with the lengths of a mix, in a new folder."""
    folder.mkdir(parents=True)
    max_steps = WARMUP + given.rounds * given.steps
    prompt, response, sigma = (8, 6, 0.3) if given.tiny else MIXES[mix]
    longest = 48 if given.tiny else LONGEST
    lengths = mixed_lengths(
        given.pairs_per_step * max_steps, prompt=prompt, response=response, sigma=sigma, longest=longest
    )
    return Task(
        model=model,
        data=write_rows(folder / "train.jsonl", random_rows(lengths, case.size.vocabulary)),
        folder=folder,
        pairs_per_step=given.pairs_per_step,
        max_steps=max_steps,
        zero=case.zero,
        max_length=longest,
        learning_rate=1e-5,
        dtype=default_dtype(),
        gradient_checkpointing=True,
    )


def make_side(name: str, case: Case, task: Task, given: argparse.Namespace, adapter: Path | None) -> Side:
    """One of SIDES; TRL with what makes it fastest, as far as it is installed."""
    if name == TRL:
        fastest: dict[str, Any] = {"use_liger_kernel": find_spec("liger_kernel") is not None}
        return theirs(TRL, task, pairs_per_micro_batch=given.trl_micro_batch, adapter=adapter, **fastest)
    reference = {"strategy": "adapter", "adapter": "base"} if case.lora else {"strategy": "separate"}
    model = {"lora": {"path": str(adapter)}} if adapter else {}
    choice = CHOICES.get(name, {})
    return ours(
        name,
        task,
        model={**model, **choice.get("model", {})},
        reference={**reference, **choice.get("reference", {})},
        batch={"tokens_per_micro_batch": case.tokens},
        data={"layout": "padded" if name == PADDED else "packed"},
    )


def case_rows(
    name: str, case: Case, given: argparse.Namespace, measured: dict[str, Measured], peak: Peak
) -> list[tuple[str, ...]]:
    """One row of `COLUMNS` for each side."""
    base = next((one for side, one in measured.items() if side != TRL), None)
    if base is None:  # which has the operations of a step in its metrics
        return []
    seconds = {
        side: statistics.median(turn["wall_s"] for turn in one.turns) / given.steps for side, one in measured.items()
    }
    flops = (
        1e12 * statistics.median(base.notes["perf/tflops_per_device"]) * statistics.median(base.notes["time/step_s"])
    )
    floor = floor_of_step(flops=flops, trained=trained_weights(case), peak=peak, offloaded=case.offloaded)
    return [side_row(name, side, measured, seconds[side], flops, floor, given.pairs_per_step) for side in measured]


def side_row(
    name: str, side: str, measured: dict[str, Measured], seconds: float, flops: float, floor: Floor, pairs: int
) -> tuple[str, ...]:
    one = measured[side]
    times = Spread.of(speedups(measured[TRL], one, "wall_s")).text(unit="x") if TRL in measured else ""
    sheet = peak_tflops(gpu_names()[0]) if gpu_names() else None
    mfu = f"{100 * flops / seconds / sheet / 1e12:.1f} %" if sheet else ""
    beside = one.notes.get("perf/overhead_share")
    return (
        name,
        side,
        f"{pairs / seconds:.2f}",
        times,
        mfu,
        f"{100 * floor.step_s / seconds:.0f} %",
        f"{one.memory['peak_mib'] / 1024:.1f}",
        f"{100 * statistics.median(beside):.1f} %" if beside else "",
    )


def trained_weights(case: Case) -> float:
    """How many weights the case trains: all, or those of LoRA of rank 16 on every linear layer below the head."""
    size = case.size
    wide = size.intermediate or 8 * size.hidden // 3 // 16 * 16
    keys = size.hidden // size.heads * size.kv_heads
    shapes = [(size.hidden, size.hidden)] * 2 + [(size.hidden, keys)] * 2 + [(size.hidden, wide)] * 3
    if case.lora:
        return 16.0 * size.layers * sum(rows + columns for rows, columns in shapes)
    heads = (1 if size.tied else 2) * size.hidden * size.vocabulary
    return float(size.layers * sum(rows * columns for rows, columns in shapes) + heads)


if __name__ == "__main__":
    main()
