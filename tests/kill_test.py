"""Kills a run again and again, resumes it, and compares it with one that was left alone.

    python -m tests.kill_test --kills 20 [--seed 0] [--folder FOLDER]

The run has two ranks under the deepspeed launcher, ZeRO-3 for the policy and for a reference that moves (TR-DPO), and a
checkpoint every second step, written while it trains on. At random moments, while it saves, trains or starts, all its
processes or one rank get SIGKILL; then it goes on with `--resume auto`. After each kill, what has a whole checkpoint's
name must be one. At the end every weight must be the uninterrupted run's bit by bit, and every step's pair ids and
metrics must stand exactly once in the records.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file

from dsdpo.atomic import digest_of_file, load_checksummed
from dsdpo.training.checkpoint import read_state, whole_checkpoints
from tests.commands.processes import Forked, launcher
from tests.ranks import stop_all
from tests.runs import demo_inputs, settings, train_on

LIMIT_S = 600  # for any one start to get where it is awaited
When = Literal["save", "train", "start"]
Whom = Literal["all", "rank 0", "rank 1"]
CLOCK = ("time/", "perf/", "memory/")


@dataclass(frozen=True)
class Kill:
    """One interruption."""

    when: When
    whom: Whom
    number: int = signal.SIGKILL
    delay_s: float = 0.0  # after the moment that `when` names
    rows: int = 1  # steps trained on before, for `train` and `save`
    python: str = sys.executable  # that runs the launcher


@dataclass
class Report:
    """What happened, and whether it can be told from a run that was left alone."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # of each start
    exit_codes: list[int] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)  # step; 0: from the beginning
    seconds: float = 0.0
    damaged: list[str] = field(default_factory=list)  # checkpoints that had a whole one's name after a kill
    same_weights: bool = False
    same_pairs: bool = False
    same_metrics: bool = False

    def summary(self) -> dict[str, Any]:
        """The report without what the processes printed."""
        return {name: value for name, value in asdict(self).items() if name != "outputs"}


def random_kills(count: int, seed: int) -> list[Kill]:
    """Half of them while saving, a few at start-up, the others in training; half of them of one rank only."""
    rng = random.Random(seed)
    kills = []
    for index in range(count):
        when: When = "save" if index % 2 == 0 else "start" if index % 8 == 7 else "train"
        whom: Whom = rng.choice(("all", "all", "rank 0", "rank 1"))
        delay = rng.uniform(0, {"save": 0.08, "train": 0.5, "start": 10.0}[when])
        kills.append(Kill(when, whom, delay_s=round(delay, 3), rows=rng.randint(1, 4)))
    return kills


def run_and_kill(folder: Path, kills: Sequence[Kill], *, steps: int) -> Report:
    """Train once without and once with the kills, and compare."""
    began = time.monotonic()
    inputs = demo_inputs(folder / "inputs")
    options: dict[str, Any] = {
        "reference": {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.3},
        "train": {"max_steps": steps},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "distributed": {"timeout_minutes": 2},
    }
    whole, killed = (settings(folder / name, inputs, **options) for name in ("whole", "killed"))
    killed["checkpoint"] = {**killed["checkpoint"], "background": True}
    whole["checkpoint"] = {**whole["checkpoint"], "background": False}
    report = Report()
    train_on(2, whole)  # what a launcher starts trains as these ranks do (tests/commands/test_train.py)
    for kill in kills:
        run = start(killed, folder, python=kill.python)
        report.kills.append(asdict(kill) | run.interrupt(kill, Path(killed["output_dir"])))
        run.finish(report)
        report.damaged += damaged(Path(killed["output_dir"]) / "checkpoints")
    assert start(killed, folder, python=kills[-1].python).finish(report) == 0
    report.resumed_from = [resumed_step(output) for output in report.outputs]
    compare(Path(whole["output_dir"]), Path(killed["output_dir"]), report)
    report.seconds = round(time.monotonic() - began, 1)
    return report


def compare(whole: Path, killed: Path, report: Report) -> None:
    """Fill in whether weights, pair ids and metrics are the same in both run folders."""
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    report.same_weights = expected.keys() == found.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    pairs = (killed / "pairs.jsonl").read_text()
    report.same_pairs = pairs == (whole / "pairs.jsonl").read_text() and pairs.count("\n") > 0
    report.same_metrics = computed(killed) == computed(whole)


def damaged(folder: Path) -> list[str]:
    """The checkpoints with a whole one's name whose files are not those of their list, read anew."""
    found = []
    for path in whole_checkpoints(folder):
        listed = load_checksummed((path / "manifest.json").read_text())
        read_state(path)
        if not listed or any(digest_of_file(path / name) != digest for name, digest in listed.items()):
            found.append(path.name)
    return found


def computed(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


@dataclass
class Started:
    """A launcher with its ranks, what they print, and how far the run was before."""

    process: subprocess.Popen[bytes] | Forked
    log: Path
    run_file: Path

    def interrupt(self, kill: Kill, folder: Path) -> dict[str, Any]:
        """Wait for the moment and send the signals; what was hit, or that the run was over before."""
        before = count_rows(folder)
        stale = half_written(folder)  # by an earlier kill
        if kill.when == "start":
            self.wait_until(lambda: self.ranks("rank 1"))
        else:
            self.wait_until(lambda: count_rows(folder) >= before + kill.rows)
        if kill.when == "save":
            self.wait_until(lambda: half_written(folder) - stale)
        time.sleep(kill.delay_s)
        saving = sorted(name for name, _ in half_written(folder) - stale)
        targets = self.ranks(kill.whom)
        for pid in targets:
            try:
                os.kill(pid, kill.number)
            except ProcessLookupError:
                continue
        return {"hit": len(targets), "saving": saving, "rows_then": count_rows(folder)}

    def ranks(self, whom: Whom) -> list[int]:
        """The processes of one rank, or all that were started."""
        members = started_with(self.run_file)
        return members if whom == "all" else [pid for pid in members if f"--local_rank={whom[-1]}" in command_of(pid)]

    def wait_until(self, condition: Any) -> None:
        """Poll, until the process ends."""
        until = time.monotonic() + LIMIT_S
        while self.process.poll() is None and not condition():
            assert time.monotonic() < until, f"the run did not get going, see {self.log}"
            time.sleep(0.002)

    def finish(self, report: Report) -> int:
        """Wait for the end, of ranks that a killed launcher leaves behind too; the exit code."""
        code = self.process.wait(LIMIT_S)
        report.exit_codes.append(code)
        report.outputs.append(self.log.read_text(errors="replace"))
        return code


def start(run: dict[str, Any], folder: Path, *, ranks: int = 2, python: str = sys.executable) -> Started:
    """The run on so many ranks under the deepspeed launcher, resumed if there is anything to resume."""
    path = folder / f"{Path(run['output_dir']).parent.name}.yaml"
    path.write_text(yaml.safe_dump(run))
    log = Path(tempfile.mkstemp(prefix="start-", suffix=".log", dir=folder)[1])
    with log.open("wb") as output:
        command = [*launcher(ranks, python=python), "train", str(path), "--resume", "auto"]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    return Started(process, log, path)


def started_with(run_file: Path) -> list[int]:
    """The processes of a run, the launcher's first: what is killed first starts nothing more."""
    found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return sorted(pid for pid in found if str(run_file) in command_of(pid))


def family(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        below.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += below.get(member, [])
    return found


def command_of(pid: int) -> list[str]:
    """The words of a process's command line; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def half_written(folder: Path) -> set[tuple[str, int]]:
    """The checkpoints under way, by name and when they last changed."""
    try:
        return {(path.name, path.stat().st_ctime_ns) for path in (folder / "checkpoints").glob("*.partial")}
    except OSError:  # just renamed
        return set()


def count_rows(folder: Path) -> int:
    """Steps in the metrics."""
    try:
        return (folder / "metrics.jsonl").read_text().count("\n")
    except OSError:
        return 0


def resumed_step(output: str) -> int:
    """The step that a start says it went on from."""
    found = [line for line in output.splitlines() if line.startswith("resumed from")]
    return int(found[0].split(": step ")[1].split()[0]) if found else 0


def main() -> int:
    """The command; exit code 0 if nothing can be told from an uninterrupted run."""
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kill-test-"))
    folder.mkdir(parents=True, exist_ok=True)
    report = run_and_kill(folder, random_kills(arguments.kills, arguments.seed), steps=6 * arguments.kills)
    stop_all()
    (folder / "report.json").write_text(json.dumps(report.summary(), indent=2) + "\n")
    for kill, step in zip(report.kills, [*report.resumed_from[1:], None], strict=False):
        print(f"SIGKILL of {kill['whom']} in {kill['when']}, saving {kill['saving'] or 'nothing'}: resumed from {step}")
    hit = [kill for kill in report.kills if kill["hit"]]
    during = sum(bool(kill["saving"]) for kill in hit)
    print(f"{len(hit)} kills landed, {during} of them during a save, in {report.seconds:.0f} s; see {folder}")
    print(f"checkpoints that were not whole: {report.damaged or 'none'}")
    print(f"weights {report.same_weights}, pair ids {report.same_pairs}, metrics {report.same_metrics}")
    return 0 if not report.damaged and report.same_weights and report.same_pairs and report.same_metrics else 1


if __name__ == "__main__":
    raise SystemExit(main())
