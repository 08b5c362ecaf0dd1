"""`dsdpo plot RUN_FOLDER`: loss, accuracy and margin of a run as one picture."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dsdpo.commands.arguments import user_path
from dsdpo.errors import ConfigError
from dsdpo.run.summary import read_metrics
from dsdpo.run_folder import RunFolder

PANELS = (
    ("loss", "loss (nats)"),
    ("rewards/accuracies", "reward accuracy"),
    ("rewards/margins", "reward margin (nats)"),
)


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(prog="dsdpo plot", description=__doc__)
    parser.add_argument("folder", type=user_path, help="output_dir of a run")
    parser.add_argument("--output", type=user_path, help="picture to write; default: metrics.png in the run folder")
    arguments = parser.parse_args(argv)
    print(plot(arguments.folder, arguments.output))
    return 0


def plot(folder: Path, output: Path | None = None) -> Path:
    """Draw `metrics.jsonl` of a run folder; the path of the picture."""
    files = RunFolder(folder)
    if not files.metrics.is_file():
        raise ConfigError(f"{folder}: no metrics.jsonl; give the output_dir of a run")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, held_out = read_metrics(folder)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS, strict=True):
        axis.plot([row["step"] for row in train], [row.get(name, math.nan) for row in train], alpha=0.6, label="train")
        if held_out:
            steps, values = [row["step"] for row in held_out], [row.get(f"eval/{name}", math.nan) for row in held_out]
            axis.plot(steps, values, "o-", label="held-out")
        axis.set(title=title, xlabel="optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    output = output or files.picture
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a file name extension that matplotlib does not know
        raise ConfigError(f"--output: {output} cannot be written ({error}); give a .png, .pdf or .svg file") from error
    finally:
        pyplot.close(figure)
    return output
