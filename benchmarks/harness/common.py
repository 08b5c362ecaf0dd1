"""What all benchmarks share: options, spread, the machine's description, tables and result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("dsdpo", "torch", "deepspeed", "transformers", "peft", "accelerate", "trl")


@dataclass(frozen=True)
class Table:
    """What is printed and stands in README.md."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown, its note below."""
        lines = [f"**{self.title}**", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def parser(module: str, description: str, *, rounds: int = 5, steps: int = 4) -> argparse.ArgumentParser:
    """The options that every benchmark has; `module` is its name below `benchmarks`."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--rounds", type=int, default=rounds, help="pairs of interleaved measurements")
    options.add_argument("--steps", type=int, default=steps, help="optimizer steps (or passes) in one measurement")
    options.add_argument("--out", type=Path, default=RESULTS / f"{module}.json", help="file for the result")
    options.add_argument("--folder", type=Path, default=None, help="keep inputs, settings and logs of all runs here")
    return options


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """An empty folder for inputs and runs: the one asked for, or one that goes away."""
    if kept is not None:
        folder = Path(tempfile.mkdtemp(prefix=time.strftime("%H%M%S-"), dir=_made(kept)))
        print(f"inputs, settings and logs: {folder}")
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dsdpo-benchmark-") as made:
        yield Path(made)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2, unit: str = "") -> str:
        """`1.52x [1.41, 1.60]`; the median alone where there is nothing else."""
        middle = f"{self.median:.{digits}f}{unit}"
        return middle if self.low == self.high else f"{middle} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        facts["cpu"] = names[0] if names else facts["cpu"]
    facts["ram_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    facts["gpus"] = gpu_names()
    facts["load_average"] = [round(value, 1) for value in os.getloadavg()]
    return facts


def gpu_names() -> list[str]:
    """Names of the CUDA devices, none on a CPU."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def versions() -> dict[str, str]:
    """Python's and those of the libraries that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_machine(result: dict[str, Any]) -> str:
    """One line on machine and versions of a result file."""
    facts, packages = result["machine"], result["versions"]
    gpus = ", ".join(facts["gpus"]) or "no GPU"
    load = facts["load_average"]
    names = ", ".join(f"{name} {packages[name]}" for name in packages)
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_gib']} GiB, {gpus}; load average {load[0]} at the start "
        f"and {result['load_average_at_end']} at the end; {names}; {result['date']}"
    )


class Report:
    """Collects tables and raw figures of one benchmark, prints them as they come and writes the result file."""

    def __init__(self, module: str, title: str, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.content: dict[str, Any] = {
            "benchmark": module,
            "title": title,
            "command": shlex.join(["python", "-m", f"benchmarks.{module}", *_shown(sys.argv[1:])]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": versions(),
            "settings": {
                name: value
                for name, value in vars(options).items()
                if not isinstance(value, Path) and name not in ("out", "folder", "model", "data")
            },
            "tables": [],
            "measured": {},
        }

    def table(self, table: Table) -> None:
        """Add and print a table."""
        self.content["tables"].append(asdict(table))
        print("\n" + table.markdown(), flush=True)

    def measured(self, name: str, figures: Any) -> None:
        """Add raw figures."""
        self.content["measured"][name] = figures

    def write(self) -> None:
        """Write the result file."""
        self.content["load_average_at_end"] = round(os.getloadavg()[0], 1)
        print(describe_machine(self.content))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        print(f"written to {self.out}")


def _shown(arguments: list[str]) -> list[str]:
    """Command-line words without this machine's paths, where they lead out of the repository."""
    return [Path(word).name if word.startswith(("/", "..", "~")) else word for word in arguments]
