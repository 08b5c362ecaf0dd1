"""`dsdpo report RUN ... --html FILE`: one run or several as one page that works offline: charts, results, settings.

Charts show their values where the mouse is, smoothing is a slider with the raw line behind, runs can be switched off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from dsdpo.commands.page import page, write_page
from dsdpo.commands.parsing import plain_parser, user_path
from dsdpo.commands.plot import SMOOTHING
from dsdpo.commands.report_script import SCRIPT, STYLE
from dsdpo.config.load import dump_yaml
from dsdpo.console import counted, say
from dsdpo.errors import ConfigError
from dsdpo.run.series import PANELS, Line, Panel, RunSeries, differences, load_series, parts_of_data

COLOURS = 6
DASHES = ("", "6 4", "2 3", "8 3 2 3")
MOST_POINTS = 2000  # of a line; longer ones are thinned
RESULTS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "nll/chosen")


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = plain_parser("dsdpo report", __doc__)
    parser.add_argument("run", metavar="RUN", type=user_path, nargs="+", help="output_dir of a run")
    parser.add_argument(
        "--html", type=user_path, metavar="FILE", help="page to write; default: report.html in the first run"
    )
    given = parser.parse_args(argv)

    runs = load_series(given.run)
    path = given.html or runs[0].folder.report
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--html: {path} is no file that can be written; give one in a folder that is there")
    write_page(path, report(runs))
    say(str(path))
    return 0


def report(runs: Sequence[RunSeries]) -> str:
    """The whole page."""
    panels = [panel for panel in (*PANELS, *parts_of_data(runs)) if any(run.lines(panel) for run in runs)]
    data = [chart(panel, runs) for panel in panels]
    charts = "".join(
        f'<div class="chart"><span class="names dim">{names(each)}</span><b>{escape(each["title"])}</b> '
        f"<small>{escape(each['unit'])}</small></div>"
        for each in data
    )
    keys = "".join(
        f'<span class="key" data-run="{index}" style="--own: var(--c{index % COLOURS})"><i></i>'
        f"{escape(run.name)}</span>"
        for index, run in enumerate(runs)
    )
    steps = ", ".join(f"{run.name}: {counted(last_step(run), 'step')}" for run in runs)
    body = f"""<h1>{escape(", ".join(run.name for run in runs))}</h1><small>{escape(steps)}</small>
<div class="tools">{keys if len(runs) > 1 else ""}<label>smoothing
<input id="smooth" type="range" min="0" max="0.98" step="0.02" value="{SMOOTHING}">
<span id="weight">{SMOOTHING:.2f}</span></label><small>points are held-out pairs</small></div>
<div class="charts">{charts}</div>
<h2>Where the time of a step goes</h2>{times(runs)}
<h2>Last held-out metrics</h2><div class="wide">{results(runs)}</div>
<h2>{"Settings that differ" if len(runs) > 1 else "Settings"}</h2><div class="wide">{settings(runs)}</div>
<div class="tip"></div>
<script type="application/json" id="data">{json.dumps(data).replace("<", chr(92) + "u003c")}</script>"""
    return page(" · ".join(run.name for run in runs), body, style=STYLE, script=SCRIPT)


def last_step(run: RunSeries) -> int:
    """The newest step that the run has a row of."""
    return int(max(row["step"] for row in (*run.train, *run.evaluations)))


def chart(panel: Panel, runs: Sequence[RunSeries]) -> dict[str, Any]:
    """What the page's script draws of a panel."""
    alone, lines = len(runs) == 1, []
    for place, run in enumerate(runs):
        for index, line in enumerate(run.lines(panel)):
            lines.append(
                {
                    "run": place,
                    "label": line.label if alone else f"{run.name} {line.label}",
                    "colour": (index if alone else place) % COLOURS,
                    "dash": "" if alone or line.held_out else DASHES[index % len(DASHES)],
                    "points": line.held_out,
                    **thinned(line),
                }
            )
    return {"title": panel.title, "unit": panel.unit, "log": panel.log, "noisy": panel.noisy, "lines": lines}


def thinned(line: Line) -> dict[str, list[Any]]:
    """The line's points, of long ones every second, third, ... and the last; null where a value is not finite."""
    every = -(-len(line.steps) // MOST_POINTS)
    kept = sorted({*range(0, len(line.steps), every), len(line.steps) - 1})
    values = [line.values[place] for place in kept]
    return {
        "xs": [line.steps[place] for place in kept],
        "ys": [float(f"{value:.6g}") if math.isfinite(value) else None for value in values],
    }


def names(each: dict[str, Any]) -> str:
    """Which line of a chart is which: by colour, or by dashes where runs have the colours."""
    first = [line for line in each["lines"] if line["run"] == each["lines"][0]["run"]]
    if len(first) < 2:
        return ""
    coloured = len({line["run"] for line in each["lines"]}) == 1
    marks = {"": "—", "6 4": "- -", "2 3": "···", "8 3 2 3": "-·"}
    found = []
    for line in first:
        label = escape(line["label"].rsplit(" ", 1)[-1] if not coloured else line["label"])
        mark = "•" if line["points"] else marks[line["dash"]]
        colour = f' style="color: var(--c{line["colour"]})"' if coloured else ""
        found.append(f"<span{colour}>{mark} {label}</span>")
    return " ".join(found)


def times(runs: Sequence[RunSeries]) -> str:
    """A bar for each run, its parts by colour, longest run at full width."""
    parts = list(dict.fromkeys(name for run in runs for name in run.times()))
    longest = max((sum(run.times().values()) for run in runs), default=0.0) or 1.0
    rows, key = "", ""
    for run in runs:
        cells = ""
        for name, seconds in run.times().items():
            colour, faint = parts.index(name) % COLOURS, ";opacity:.55" if parts.index(name) >= COLOURS else ""
            style = f"width:{100 * seconds / longest:.2f}%;background:var(--c{colour}){faint}"
            cells += f'<i style="{style}" title="{name.replace("_", " ")}: {seconds:.3g} s"></i>'
        rows += f"<span>{escape(run.name)} <small>{sum(run.times().values()):.3g} s</small></span>"
        rows += f'<div class="bar">{cells}</div>'
    for index, name in enumerate(parts):
        faint = "" if index < COLOURS else "opacity:.55"
        key += (
            f'<span style="margin-right:1rem"><span style="color:var(--c{index % COLOURS});{faint}">■</span> '
            f"{name.replace('_', ' ')}</span>"
        )
    return f'<div class="bars">{rows}</div><p class="dim">{key}</p>'


def results(runs: Sequence[RunSeries]) -> str:
    """The last evaluation of each run, and the most memory."""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = []
    for name in RESULTS:
        values = [run.evaluations[-1].get(f"eval/{name}") if run.evaluations else None for run in runs]
        rows.append((name, values))
    rows.append(("memory/peak_gib", [max((row.get("memory/peak_gib", 0.0) for row in run.train), default=None)
                                     for run in runs]))  # fmt: skip
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{'' if v is None else f'{v:.4f}'}</td>" for v in values) + "</tr>"
        for name, values in rows
        if any(value is not None for value in values)
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def settings(runs: Sequence[RunSeries]) -> str:
    """The settings in which several runs differ, or all of one."""
    if len(runs) == 1:
        known = runs[0].settings
        return f"<pre><code>{escape(dump_yaml(known))}</code></pre>" if known else "<p>not readable</p>"
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>" + "".join(f"<td>{shown(v)}</td>" for v in values) + "</tr>"
        for key, values in differences(runs)
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def shown(value: Any) -> str:
    """A setting as YAML has it; of a list of sources the paths."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return escape(", ".join(str(each.get("path", each)) for each in value))
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else escape(str(value))
