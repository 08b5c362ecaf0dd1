"""`dsdpo plot RUN ...`: one run or several side by side, as one picture.

Loss, accuracy, margin, rewards, log-probs, gradient norm, learning rate, throughput, memory and where the time goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdpo.commands.parsing import plain_parser, user_path
from dsdpo.errors import ConfigError
from dsdpo.run.series import PANELS, load_series, smoothed

SMOOTHING = 0.8
DRAWN = (
    "Loss", "Accuracy of rewards", "Reward margin", "Rewards", "Log-probs", "Gradient norm",
    "Learning rate", "Throughput", "Memory of a rank at most",
)  # fmt: skip
STYLES = ("-", "--", ":", "-.")


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = plain_parser("dsdpo plot", __doc__)
    parser.add_argument("run", metavar="RUN", type=user_path, nargs="+", help="output_dir of a run")
    parser.add_argument("--output", type=user_path, help="picture to write; default: metrics.png in the first run")
    parser.add_argument(
        "--smooth", type=float, default=SMOOTHING, metavar="W",
        help=f"share of what came before in the smoothed line, 0 to below 1; 0: none; default: {SMOOTHING}",
    )  # fmt: skip
    given = parser.parse_args(argv)
    if not 0 <= given.smooth < 1:
        parser.error(f"--smooth is {given.smooth}: give a number from 0 to below 1")
    print(plot(given.run, given.output, smooth=given.smooth))
    return 0


def plot(folders: Path | Sequence[Path], output: Path | None = None, *, smooth: float = SMOOTHING) -> Path:
    """Draw `metrics.jsonl` of run folders; the path of the picture. Raises `ConfigError`."""
    runs = load_series([folders] if isinstance(folders, Path) else folders)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for title in DRAWN for panel in PANELS if panel.title == title]
    panels = [panel for panel in panels if any(run.lines(panel) for run in runs)]
    rows = -(-(len(panels) + 1) // 5)
    figure, grid = pyplot.subplots(rows, 5, figsize=(19, 3.7 * rows), layout="constrained", squeeze=False)
    axes = [axis for row in grid for axis in row]
    for axis, panel in zip(axes, panels, strict=False):
        draw(axis, panel, runs, smooth)
    draw_times(axes[len(panels)], runs)
    for axis in axes[len(panels) + 1 :]:
        axis.set_visible(False)
    figure.suptitle(", ".join(run.name for run in runs), fontsize=12, x=0.01, ha="left")
    output = output or runs[0].folder.picture
    try:
        figure.savefig(output, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: a file name extension that matplotlib does not know
        raise ConfigError(f"--output: {output} cannot be written ({error}); give a .png, .pdf or .svg file") from error
    finally:
        pyplot.close(figure)
    return output


def draw(axis: Any, panel: Any, runs: Sequence[Any], smooth: float) -> None:
    """One panel: of one run a colour for each line; of several a colour for each run and a style for each line."""
    alone = len(runs) == 1
    for place, run in enumerate(runs):
        for index, line in enumerate(run.lines(panel)):
            colour = f"C{index if alone else place}"
            label = line.label if alone else run.name if index == 0 else None
            if line.held_out:
                axis.plot(line.steps, line.values, "o-", markersize=3.5, color=colour, label=label)
                continue
            thick = smooth > 0 and panel.noisy and len(line.values) > 2
            if thick:
                axis.plot(line.steps, line.values, color=colour, alpha=0.25, linewidth=1)
            values = smoothed(line.values, smooth) if thick else line.values
            style = "-" if alone else STYLES[index % len(STYLES)]
            axis.plot(line.steps, values, style, color=colour, label=label, linewidth=1.6)
    if panel.log and all(value > 0 for run in runs for line in run.lines(panel) for value in line.values):
        axis.set_yscale("log")
    named = alone and len(runs[0].lines(panel)) > 1
    styles = ""
    if not alone and len(panel.metrics) > 1:
        pairs = zip(panel.metrics, ("—", "- -", "···"), strict=False)
        styles = f" ({', '.join(f'{label} {style}' for (label, _), style in pairs)})"
    axis.set_title(panel.title + (f", {panel.unit}" if panel.unit else "") + styles, fontsize=10)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if named or (not alone and panel.title == DRAWN[0]):
        axis.legend(frameon=False, fontsize=8)


def draw_times(axis: Any, runs: Sequence[Any]) -> None:
    """Where the time of a step goes, a bar for each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.times()))
    before = [0.0] * len(runs)
    for index, name in enumerate(names):
        widths = [run.times().get(name, 0.0) for run in runs]
        rows = range(len(runs))
        axis.barh(rows, widths, 0.6, left=before, label=name.replace("_", " "), color=f"C{index}")
        before = [start + width for start, width in zip(before, widths, strict=True)]
    axis.set_yticks(range(len(runs)), [run.name for run in runs])
    axis.set_ylim(len(runs) + 0.9, -0.6)  # room for the legend below the bars
    axis.set_title("Time of a step by part, s", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
