"""`dsdpo doctor [RUN.yaml]`: what would stop a run here, or slow it down, on every node of a launcher."""

from __future__ import annotations

import json
from dataclasses import asdict

from dsdpo.commands.arguments import DoctorArguments
from dsdpo.console import quiet_libraries, say, wrapped
from dsdpo.distributed import rank
from dsdpo.engine.start import start_distributed
from dsdpo.run.examination import examine
from dsdpo.run.health import Finding
from dsdpo.training.lost_ranks import watched_ranks

STOPS = 1  # exit code: a run would not get far
ORDER = ("red", "yellow", "ok")
SIGNS = {"red": "STOP", "yellow": "look", "ok": "ok"}


def main(given: DoctorArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=False)
    start_distributed(timeout_minutes=given.timeout_minutes)
    with watched_ranks(lost_after=given.lost_after):
        findings = examine(given.run, given.run_file)
    findings.sort(key=lambda finding: ORDER.index(finding.level))
    if rank() == 0:
        say(json.dumps([asdict(finding) for finding in findings], indent=2) if given.as_json else table(findings))
    return STOPS if any(finding.level == "red" for finding in findings) else 0


def table(findings: list[Finding]) -> str:
    """The findings as lines, those that stop a run first."""
    lines = []
    for finding in findings:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        where = f" [{finding.where}]" if finding.where else ""
        line = f"{SIGNS[finding.level]:>6}  {finding.what}: {finding.value}{remedy}{where}"
        lines.append(wrapped(line, indent=8))
    bad = sum(finding.level == "red" for finding in findings)
    lines.append(f"{bad or 'nothing'} would stop a run here" if bad != 1 else "1 thing would stop a run here")
    return "\n".join(lines)
