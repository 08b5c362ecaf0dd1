"""Everything in `examples/` runs: the scripts and the notebook check their own results."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.test_api import forget_losses

FOLDER = Path(__file__).parents[1] / "examples"


def run_script(script: Path, folder: Path) -> None:
    """On a rank: the script as `python SCRIPT` in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        os.chdir(before)
        forget_losses()


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_script_runs(script: Path, tmp_path: Path) -> None:
    run_ranks(1, run_script, script, tmp_path)
    assert f"python examples/{script.name}" in script.read_text(), "its first lines say how to start it"


def test_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((FOLDER / "dpo_by_hand.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for number, text in enumerate(code):
        assert "assert" in text or number == 0, "each cell checks what it shows"
        exec(compile(text, f"dpo_by_hand.ipynb, code cell {number + 1}", "exec"), names)
    assert "alpha 1.0: loss 0.6931" in capsys.readouterr().out
    assert all(not cell.get("outputs") for cell in cells), "outputs are not kept in the repository"
