"""Makes of the tests in this folder one report: `make gpu` prints it as a table and writes it as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

REPORT = os.environ.get("DSDPO_GPU_REPORT")  # the file to write
_rows: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep each test's outcome, its reason if it did not run, and the figures it recorded."""
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _rows[report.nodeid] = {
            "test": report.nodeid.removeprefix("tests/"),
            "outcome": {"skipped": "not run"}.get(report.outcome, report.outcome),
            "seconds": round(report.duration, 1),
            "reason": reason.removeprefix("Skipped: "),
            "figures": dict(report.user_properties),
        }
        if REPORT is not None:
            write(Path(REPORT))  # what is stopped before its end has said what it found until then


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the report, if one was asked for."""
    if REPORT is not None:
        terminalreporter.write_line("\n" + table(write(Path(REPORT))))
        terminalreporter.write_line(f"the same as JSON: {REPORT}")


def write(path: Path) -> dict[str, Any]:
    """Write the report as far as it goes; its content."""
    from benchmarks.harness.common import machine, versions

    content = {"machine": machine(), "versions": versions(), "cuda": cuda(), "tests": list(_rows.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def cuda() -> dict[str, Any]:
    """Versions and sizes of the CUDA devices, empty on a CPU."""
    import torch

    if os.environ.get("DS_ACCELERATOR") != "cuda":
        return {}
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "devices": torch.cuda.device_count(),
        "memory_gib": round(device.total_memory / 2**30, 1),
        "capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def table(content: dict[str, Any]) -> str:
    """The report in Markdown, to paste into an issue: what failed first, then what did not run, then the rest.

    A test's cases of one outcome and reason share a row, with the figures of each.
    """
    order = {"failed": 0, "not run": 1, "passed": 2}
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in sorted(content["tests"], key=lambda row: order.get(row["outcome"], 0)):
        test, _, case = row["test"].partition("[")
        figures = ", ".join(f"{name} {value}" for name, value in row["figures"].items())
        named = f"{case.rstrip(']')}: {figures}" if case and figures else figures
        groups.setdefault((test, row["outcome"], row["reason"]), []).append(named)
    device = content["cuda"].get("device", "no CUDA device")
    packages = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [f"**{device}**: {packages}", "", "| test | outcome | figures |", "|---|---|---|"]
    for (test, outcome, reason), figures in groups.items():
        count = f"{len(figures)} " if len(figures) > 1 else ""
        shown = "; ".join(filter(None, figures)) or reason
        lines.append(f"| {test} | {count}{outcome} | {shown} |")
    return "\n".join(lines)
