"""Every DeepSpeed JSON in ds_configs/ and ds_configs/reference/: time per step and memory on two ranks.

python -m benchmarks.zero_configs [--model FOLDER --data FILE.jsonl]
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.common import ROOT, Report, Table, parser, work_folder
from benchmarks.harness.compare import raw
from benchmarks.harness.processes import Measured, Side, environment, measure_memory, run_sides
from benchmarks.harness.sides import Task, ours
from benchmarks.strategies import COST_COLUMNS, add_run_options, cost_row, make_task, run_sections

POLICIES = ROOT / "ds_configs"
REFERENCES = POLICIES / "reference"
BASE = "zero3 beside zero3"
TOGETHER = 2  # runs that are alive at once beside the base


def main() -> None:
    """Measure and report."""
    options = parser("zero_configs", "Time and memory of the shipped DeepSpeed JSONs.")
    add_run_options(options)
    given = options.parse_args()
    report = Report("zero_configs", "The shipped DeepSpeed JSONs", given)
    rows: list[tuple[str, ...]] = []
    skipped: list[str] = []
    with work_folder(given.folder) as folder:
        task = make_task(given, folder)
        combinations = [(path.stem, "zero3") for path in sorted(POLICIES.glob("*.json")) if path.stem != "zero3"]
        combinations += [("zero3", path.stem) for path in sorted(REFERENCES.glob("*.json")) if path.stem != "zero3"]
        nvme = async_io_works()
        if not nvme:
            skipped = [
                f"{policy} beside {reference}" for policy, reference in combinations if "nvme" in policy + reference
            ]
        sides = [
            config_side(task, policy, reference, run_sections(given))
            for policy, reference in combinations
            if nvme or "nvme" not in policy + reference
        ]
        base = config_side(task, "zero3", "zero3", run_sections(given))
        memory = {} if given.quick_memory else measure_memory([base], steps=given.steps)
        for start in range(0, len(sides), TOGETHER):
            part = sides[start : start + TOGETHER]
            first = replace(base, folder=base.folder / f"beside{start}")
            measured: dict[str, Measured] = run_sides([first, *part], rounds=given.rounds, steps=given.steps)
            if not given.quick_memory:
                memory |= measure_memory(part, steps=given.steps)
            report.measured(", ".join(side.name for side in part), raw(measured, None))
            names = [*([] if rows else [BASE]), *(side.name for side in part)]
            rows += [cost_row(name, measured, memory, base=BASE, steps=given.steps) for name in names]
    report.measured("memory", {name: one.memory for name, one in memory.items()})
    note = "Policy's JSON beside reference's, each run in turns with the first."
    if skipped:
        note += f" Left out, as DeepSpeed's async_io operator (libaio) cannot be built here: {', '.join(skipped)}."
    report.table(Table(f"{task.ranks} ranks, {given.pairs_per_step} pairs per step", COST_COLUMNS, tuple(rows), note))
    report.write()


def config_side(task: Task, policy: str, reference: str, sections: dict[str, dict[str, object]]) -> Side:
    """A run under two shipped JSONs, NVMe folders moved to where this benchmark may write."""
    name = f"{policy} beside {reference}"
    folder = task.folder / "configs" / name.replace(" ", "-")
    folder.mkdir(parents=True)
    policy_json = moved(POLICIES / f"{policy}.json", folder / "policy.json", folder / "nvme")
    reference_json = moved(REFERENCES / f"{reference}.json", folder / "reference.json", folder / "nvme-reference")
    side = ours(name, task, reference={"strategy": "separate", "deepspeed": str(reference_json)}, **sections)
    settings = Path(side.arguments[0])
    settings.write_text(settings.read_text().replace(str(settings.parent / "deepspeed.json"), str(policy_json)))
    return side


def moved(source: Path, target: Path, nvme: Path) -> Path:
    """The JSON with its swap files in another folder."""
    config = json.loads(source.read_text())
    for block in config["zero_optimization"].values():
        if isinstance(block, dict) and "nvme_path" in block:
            nvme.mkdir(parents=True, exist_ok=True)
            block["nvme_path"] = str(nvme)
    target.write_text(json.dumps(config))
    return target


def async_io_works() -> bool:
    """Whether DeepSpeed can build what NVMe offload needs."""
    check = "from deepspeed.ops.op_builder import AsyncIOBuilder as B; raise SystemExit(not B().is_compatible())"
    done = subprocess.run([sys.executable, "-c", check], env=environment(), capture_output=True, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    main()
