"""Writes the results in results/ into README.md, below its marker.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.common import RESULTS, ROOT, Table, describe_machine

README = ROOT / "benchmarks" / "README.md"
MARKER = "<!-- below: written by python -m benchmarks.report from results/ -->\n"


def main() -> None:
    """Rewrite the generated part."""
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")


def with_results(readme: str) -> str:
    """The page with what is below the marker made anew."""
    head, marker, _ = readme.partition(MARKER)
    if not marker:
        raise SystemExit(f"{README} has no line {MARKER.strip()}")
    sections = [section(json.loads(path.read_text(encoding="utf-8"))) for path in result_files()]
    return head + MARKER + "".join("\n" + text for text in sections)


def result_files() -> list[Path]:
    """Every benchmark's last result."""
    return sorted(RESULTS.glob("*.json"))


def section(result: dict[str, Any]) -> str:
    """One benchmark: how to run it, its tables, where it ran."""
    tables = [
        Table(table["title"], tuple(table["columns"]), tuple(map(tuple, table["rows"])), table["note"])
        for table in result["tables"]
    ]
    parts = [f"## {result['title']}\n", f"`{result['command']}`\n", *(table.markdown() for table in tables)]
    return "\n".join([*parts, f"Measured on {describe_machine(result)}.\n"])


if __name__ == "__main__":
    main()
