"""`dsdpo plot` and `dsdpo report`: every value of the runs is in them, and a browser draws them without a network."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.__main__ import main
from dsdpo.run.series import short_names, smoothed
from tests.runs import settings


def write_run(folder: Path, inputs: Path, *, beta: float, scale: float) -> Path:
    """A run folder as training leaves it, of ten steps and two evaluations."""
    spec = settings(folder, inputs, reference_zero=None, loss={"beta": beta})
    run = Path(spec["output_dir"])
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(spec))
    rows: list[dict[str, Any]] = []
    for step in range(1, 11):
        row = {"step": step, "loss": scale / step, "rewards/accuracies": 0.5, "rewards/margins": 0.1 * step,
               "rewards/chosen": -0.1, "rewards/rejected": -0.2 * step, "grad_norm": None if step == 3 else 2.0,
               "learning_rate": 1e-6, "perf/pairs_per_s": 9.0, "memory/peak_gib": 1.5, "time/step_s": 2.0,
               "time/data_s": 0.5, "time/forward_backward_s": 1.5, "source/a/loss": 0.1,
               "source/b/loss": 0.2}  # fmt: skip
        rows.append(row)
        if step % 5 == 0:
            rows.append({"step": step, "eval/loss": scale / step + 0.01, "eval/rewards/accuracies": 0.75})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "a", inputs, beta=0.1, scale=1.0), write_run(folder / "b", inputs, beta=0.3, scale=2.0)


def data_of(page: Path) -> dict[str, dict[str, Any]]:
    """The charts' data by title."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return {chart["title"]: chart for chart in json.loads(found[1])}


def test_the_page_has_the_values_of_all_runs_and_asks_nobody(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", *map(str, runs), "--html", str(page)]) == 0
    charts, text = data_of(page), page.read_text()
    lines = {line["label"]: line for line in charts["Loss"]["lines"]}
    assert lines["b/run train"]["ys"] == [pytest.approx(2 / step, rel=1e-5) for step in range(1, 11)]
    assert lines["a/run held-out"]["xs"] == [5, 10]
    assert charts["Gradient norm"]["lines"][0]["ys"][2] is None
    assert [line["label"] for line in charts["Loss by source"]["lines"]] == ["a/run a", "a/run b", "b/run a", "b/run b"]
    assert "loss.beta</code></td><td>0.1</td><td>0.3</td>" in text
    assert "prefers-color-scheme: dark" in text
    for word in ("http://", "https://", " src=", "@import", "url("):
        assert word not in text.replace("http://www.w3.org/2000/svg", "")
    assert main(["report", str(runs[0] / "config.yaml")]) == 0
    assert "pairs_per_step" in (runs[0] / "report.html").read_text()


def test_a_browser_draws_every_chart(runs: tuple[Path, Path], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    page = tmp_path / "report.html"
    assert main(["report", *map(str, runs), "--html", str(page)]) == 0
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]  # fmt: skip
    said = subprocess.run([browser, *options, f"file://{page}"], capture_output=True, text=True, timeout=240)
    assert said.stdout.count("<svg") == len(data_of(page))
    assert said.stdout.count("<path d=") >= sum(len(chart["lines"]) for chart in data_of(page).values())
    assert 'd="MNaN' not in said.stdout
    assert " NaN" not in said.stdout


def test_several_runs_become_one_picture(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("runs.png", "runs.svg"):
        assert main(["plot", *map(str, runs), "--output", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 10_000
    drawn = (tmp_path / "runs.svg").read_text()
    for title in ("Loss, nats", "Gradient norm", "a/run, b/run", "Time of a step by part, s"):
        assert f"<!-- {title} -->" in drawn


def test_smoothing_has_no_bias_at_the_start_and_passes_over_nan() -> None:
    assert smoothed([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])
    # Weight 0.5: (0.5 · 0.5 · 1 + 0.5 · 4) / (0.25 + 0.5) = 3.
    assert smoothed([1.0, math.nan, 4.0], 0.5) == pytest.approx([1.0, 1.0, 3.0])


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/x/one"), Path("/x/two")]) == ["one", "two"]
    assert short_names([Path("/x/mine/output")]) == ["mine/output"]


@pytest.mark.parametrize(
    ("argv", "mentions"),
    [
        (["plot"], "RUN"),
        (["plot", "nowhere"], "nowhere: no metrics.jsonl"),
        (["plot", "RUN", "--smooth", "1"], "below 1"),
        (["plot", "RUN", "--smooth", "x"], "invalid float"),
        (["plot", "RUN", "--output", "x.doc"], "cannot be written"),
        (["report", "RUN", "nowhere"], "nowhere: no metrics.jsonl"),
        (["report", "RUN", "--html", "nowhere/x.html"], "no file that can be written"),
        (["report", "EMPTY"], "holds no row yet"),
        (["report", "BROKEN"], "cannot be read: line 1 is no JSON"),
        (["report", "TEXT"], "line 2: loss is no number"),
        (["plot", "LIST"], "line 1 is no row of metrics"),
        (["compare", "ENDLESS", "RUN"], "line 1 is no row of metrics: it has no step"),
    ],
)
def test_what_is_refused(
    argv: list[str], mentions: str, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = {
        "EMPTY": "",
        "BROKEN": "{\n",
        "TEXT": '{"step": 1, "loss": 1}\n{"step": 2, "loss": "x"}\n',
        "LIST": "[1]\n",
        "ENDLESS": '{"step": 1e999, "loss": 1}\n',
    }
    places = {"RUN": str(runs[0])} | {name: str(tmp_path / name) for name in damaged}
    for name, content in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content)
    assert main([places.get(word, word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert mentions in said
    assert said.count("dsdpo: ") == 1
