"""Where the time of a training step goes, by kind of work, and what the machine's measured peak would allow for each.

Real steps of a whole run under torch's profiler, in turns with steps that are not traced. On CUDA devices by their
kernels and the gaps between them, on a CPU by operators' own times (`harness/trace.py`, `harness/kinds.py`).

    python -m benchmarks.step_split [--model FOLDER --data FILE.jsonl]             two ranks under ZeRO-3
    python -m benchmarks.step_split --cases 1b 8b-lora                             those of benchmarks.gpu, on one GPU
    python -m benchmarks.step_split --trace runs/mine/profile/rank-0.trace.json.gz of tracking.profile_steps
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import gpu
from benchmarks.gpu_peak import measured_peak
from benchmarks.harness.common import Report, Spread, Table, gpu_names, parser, work_folder
from benchmarks.harness.inputs import make_adapter, make_model
from benchmarks.harness.kinds import KINDS, MODEL, UNKNOWN
from benchmarks.harness.processes import Measured, Side, run_sides
from benchmarks.harness.roofline import Peak, Shape, Work, shortest
from benchmarks.harness.sides import ours
from benchmarks.harness.trace import Split, read_trace
from benchmarks.strategies import WARMUP, add_run_options, make_task, run_sections
from dsdpo.estimate.hardware import peak_tflops

COLUMNS = ("work", "ms a step", "of the step", "beside other kernels, ms", "shortest, ms", "reached")
TARGETS = ("figure", "measured", "target")
MFU_TARGETS = {"1b": "≥ 50 %", "8b-lora": "≥ 40 %"}
NOTE = (
    "Median [lowest, highest] of traced steps, means over ranks. Shortest: the formulas' operations at the measured "
    "matrix product, bytes at the measured copy or host link, each kind alone; no padding, no recomputation. What a "
    "gather or a copy runs beside other kernels is not in its time."
)


@dataclass(frozen=True)
class Run:
    """A measured run, and what its table is held against."""

    name: str
    side: Side
    model: Path
    dtype: str
    offloaded: bool = False


def main() -> None:
    """Measure and report."""
    options = parser("step_split", "The time of a training step by kind of work.", rounds=3, steps=2)
    add_run_options(options, memory=False)
    options.add_argument("--cases", nargs="+", default=[], choices=list(gpu.CASES), help="of benchmarks.gpu")
    options.add_argument(
        "--mix", default="ultrafeedback", choices=list(gpu.MIXES), help="lengths of those cases' pairs"
    )
    options.add_argument("--trace", nargs="+", type=Path, default=[], help="split these traces, and run nothing")
    given = options.parse_args()
    report = Report("step_split", "The time of a step by kind of work", given)
    if given.trace:
        for path in given.trace:
            report.table(table_of(path.name, read_trace(path), {}))
        return
    if given.cases and not gpu_names() and not given.tiny:
        raise SystemExit("benchmarks.step_split: --cases needs a CUDA device")
    with work_folder(given.folder) as folder:
        peak = measured_peak(folder)
        report.measured("peak", asdict(peak))
        given.rounds *= 2  # of which every second one is traced
        for run in runs_of(given, folder):
            one_run(run, given, peak, report)
            report.write()


def runs_of(given: argparse.Namespace, folder: Path) -> list[Run]:
    """The given model on two ranks under ZeRO-3, or the cases asked for."""
    module = "benchmarks.measured.split_ranks"
    if not given.cases:
        task = make_task(given, folder)
        side = ours("split", task, **run_sections(given), reference={"strategy": "separate"})
        name = f"{task.ranks} ranks, ZeRO-3, {given.pairs_per_step} pairs per step"
        return [Run(name, replace(side, module=module), task.model, task.dtype)]
    found = []
    for name in given.cases:
        case = replace(gpu.TINY, lora=gpu.CASES[name].lora) if given.tiny else gpu.CASES[name]
        model = make_model(folder / f"model-{name}", case.size)
        task = gpu.make_task(case, given, model, given.mix, folder / name)
        adapter = make_adapter(model, folder / f"adapter-{name}", rank=16) if case.lora else None
        side = gpu.make_side(gpu.PACKED, case, task, given, adapter)
        found.append(Run(name, replace(side, module=module), model, task.dtype, case.offloaded))
    return found


def one_run(run: Run, given: argparse.Namespace, peak: Peak, report: Report) -> None:
    """Measure a run and add its tables."""
    measured = run_sides([run.side], rounds=given.rounds, steps=given.steps, warmup=WARMUP)[run.side.name]
    splits = traced_steps(run.side.folder / "start0", run.side.ranks, given.rounds)
    floor = shortest(work_of(measured, splits, run), shape_of(run), peak, offloaded=run.offloaded)
    plain = [turn["wall_s"] / given.steps for turn in measured.turns[::2]]
    report.measured(run.name, {
        "steps": [asdict(split) for split in splits], "plain_s": plain, "shortest_s": floor, "notes": measured.notes,
    })  # fmt: skip
    report.table(table_of(run.name, splits, floor, plain))
    report.table(targets_of(run, measured, splits, plain, peak))


def traced_steps(folder: Path, ranks: int, turns: int) -> list[Split]:
    """The steps of all traced turns, each the mean of its ranks."""
    found = []
    for turn in range(1, turns, 2):
        of_ranks = [read_trace(folder / f"trace-{turn}.{rank}.json") for rank in range(ranks)]
        found += [mean(step) for step in zip(*of_ranks, strict=True)]
    return found


def mean(splits: Sequence[Split]) -> Split:
    """The mean of the same step on several ranks."""

    def of(parts: Sequence[dict[str, float]]) -> dict[str, float]:
        total: Counter[str] = Counter()
        for part in parts:
            total.update(part)
        return {name: value / len(parts) for name, value in total.items()}

    return Split(
        statistics.fmean(split.wall for split in splits),
        of([split.kinds for split in splits]),
        of([split.hidden for split in splits]),
        statistics.fmean(split.copied for split in splits),
        statistics.fmean(split.launches for split in splits),
        of([split.unknown for split in splits]),
        of([split.host for split in splits]),
    )


def work_of(measured: Measured, splits: Sequence[Split], run: Run) -> Work:
    """What a step asked of a rank, by the run's own count."""
    notes, ranks = measured.notes, run.side.ranks

    def note(name: str) -> float:
        return statistics.fmean(notes.get(name, [0.0])[WARMUP:] or notes[name])

    item = itemsize(run.dtype)
    reduced = note("work/trained") * item if ranks > 1 else 0.0
    return Work(
        trunk=note("work/trunk") / ranks,
        attention=note("work/attention") / ranks,
        head=note("work/head") / ranks,
        tokens=note("work/tokens") / ranks,
        trained=note("work/trained") / ranks,
        exchanged=note("comm/gathered_gib") * 2**30 + reduced,
        copied=statistics.fmean(split.copied for split in splits),
        reference=bool(note("work/reference")),
    )


def shape_of(run: Run) -> Shape:
    """The sizes of the run's model."""
    return Shape.of(json.loads((run.model / "config.json").read_text()), itemsize=itemsize(run.dtype))


def itemsize(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype == "float32" else 2


def table_of(title: str, splits: Sequence[Split], floor: dict[str, float], plain: Sequence[float] = ()) -> Table:
    """A row for each kind of work, and for the whole."""
    rows = []
    for kind in KINDS:
        if kind != UNKNOWN and not any(split.kinds.get(kind) for split in splits):
            continue  # copies on a CPU, gathers on one device
        spent = Spread.of([1000 * split.kinds.get(kind, 0.0) for split in splits])
        share = Spread.of([100 * split.kinds.get(kind, 0.0) / split.wall for split in splits])
        hidden = 1000 * statistics.median(split.hidden.get(kind, 0.0) for split in splits)
        least = 1000 * floor.get(kind, 0.0)
        reached = f"{100 * least / spent.median:.0f} %" if least and spent.median else ""
        rows.append(
            (kind, spent.text(1), share.text(1, " %"), f"{hidden:.1f}" if hidden >= 0.05 else "",
             f"{least:.2f}" if kind in floor else "", reached)
        )  # fmt: skip
    whole = Spread.of([1000 * split.wall for split in splits])
    least = 1000 * sum(floor.values())
    rows.append(("all, traced", whole.text(1), "100 %", "", f"{least:.2f}" if floor else "",
                 f"{100 * least / whole.median:.0f} %" if floor else ""))  # fmt: skip
    if plain:
        alone = Spread.of([1000 * seconds for seconds in plain])
        rows.append(("all, not traced", alone.text(1), "", "", f"{least:.2f}", f"{100 * least / alone.median:.0f} %"))
    return Table(title, COLUMNS, tuple(rows), NOTE + unknown_of(splits))


def unknown_of(splits: Sequence[Split]) -> str:
    """What no rule knew, by name."""
    total: Counter[str] = Counter()
    for split in splits:
        total.update(split.unknown)
    names = ", ".join(name for name, _ in total.most_common(5))
    return f" Unclassified: {names}." if names else ""


def targets_of(run: Run, measured: Measured, splits: Sequence[Split], plain: Sequence[float], peak: Peak) -> Table:
    """What a step should reach, and what it does."""
    beside = [100 * (1 - sum(split.kinds.get(kind, 0.0) for kind in MODEL) / split.wall) for split in splits]
    unknown = [100 * split.kinds.get(UNKNOWN, 0.0) / split.wall for split in splits]
    flops = statistics.median(
        1e12 * tflops * step for tflops, step in zip(measured.notes["perf/tflops_per_device"],
                                                     measured.notes["time/step_s"], strict=True)
    )  # fmt: skip
    sheet = peak_tflops(gpu_names()[0]) if gpu_names() else None
    most, of = (sheet, "data sheet's peak (MFU)") if sheet else (peak.tflops, "measured matrix product")
    launches, alone = statistics.median(split.launches for split in splits), statistics.median(plain)
    rows = (
        ("beside the models' own work", Spread.of(beside).text(1, " %"), "< 5 %"),
        (f"operations, of the {of}", Spread.of([100 * flops / s / most / 1e12 for s in plain]).text(1, " %"),
         MFU_TARGETS.get(run.name, "") if sheet else ""),
        ("unclassified", Spread.of(unknown).text(2, " %"), "< 1 %"),
        ("kernels a step" if gpu_names() else "operators a step that compute", f"{launches:.0f}", ""),
        ("a traced step, of one that is not", f"{statistics.median(s.wall for s in splits) / alone:.2f}x", ""),
    )  # fmt: skip
    note = "Operations are the formulas', over steps that are not traced."
    return Table(f"{run.name}: targets", TARGETS, rows + host_rows(splits), note)


def host_rows(splits: Sequence[Split]) -> tuple[tuple[str, ...], ...]:
    """What a CPU's own time is spent in, the most first."""
    parts = {
        part: Spread.of([1000 * split.host.get(part, 0.0) for split in splits])
        for part in sorted({part for split in splits for part in split.host})
    }
    most = sorted(parts.items(), key=lambda one: -one[1].median)
    return tuple((f"of the host: {part}", spent.text(1, " ms"), "") for part, spent in most)


if __name__ == "__main__":
    main()
