"""The metrics of runs as lines to draw: which there are, of one run or several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.load import flat
from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.run.finished import is_run_folder, open_run
from dsdpo.run_folder import RunFolder
from dsdpo.training.jsonl import read_metrics

TIMES = ("data", "reference", "forward_backward", "optimizer", "sync", "log", "other")  # parts of a step
ASIDE = ("output_dir", "overwrite_output_dir", "checkpoint.resume")  # settings that differ for no reason of interest


@dataclass(frozen=True)
class Line:
    """A metric over optimizer steps."""

    label: str
    steps: list[int]
    values: list[float]
    held_out: bool = False


@dataclass(frozen=True)
class Panel:
    """What belongs into one picture: metrics by the label of their line; those that a run lacks are left out."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]  # label, metric
    held_out: bool = False  # whether evaluations have it too, as eval/METRIC
    log: bool = False  # on a logarithmic axis
    noisy: bool = True  # whether a smoothed line says more


BOTH = (("chosen", "chosen"), ("rejected", "rejected"))
PANELS = (
    Panel("Loss", "nats", (("train", "loss"),), held_out=True),
    Panel("Accuracy of rewards", "share", (("train", "rewards/accuracies"),), held_out=True),
    Panel("Reward margin", "nats", (("train", "rewards/margins"),), held_out=True),
    Panel("Rewards", "nats", tuple((label, f"rewards/{name}") for label, name in BOTH)),
    Panel("Log-probs", "nats", tuple((label, f"logps/{name}") for label, name in BOTH)),
    Panel("Length of responses", "tokens", tuple((label, f"lengths/{name}") for label, name in BOTH)),
    Panel("NLL of chosen", "nats a token", (("train", "nll/chosen"),), held_out=True),
    Panel("Drift from the reference", "nats", (("train", "reference/drift"),), held_out=True),
    Panel("Gradient norm", "", (("before clipping", "grad_norm"),), log=True),
    Panel("Learning rate", "", (("learning rate", "learning_rate"),), noisy=False),
    Panel("Throughput", "pairs/s", (("pairs/s", "perf/pairs_per_s"),)),
    Panel("Time of a step", "s", (("step", "time/step_s"),)),
    Panel("Memory of a rank at most", "GiB", (("peak", "memory/peak_gib"),), noisy=False),
    Panel("Outside of the two models", "share of time", (("overhead", "perf/overhead_share"),)),
)


@dataclass(frozen=True)
class RunSeries:
    """A run as it is drawn."""

    name: str
    folder: RunFolder
    train: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    settings: RunConfig | None  # None: its config.yaml is of another version

    def line(self, label: str, metric: str, *, held_out: bool = False) -> Line | None:
        """A metric of the run, where it has it."""
        rows, key = (self.evaluations, f"eval/{metric}") if held_out else (self.train, metric)
        there = [row for row in rows if key in row]
        if not there:
            return None
        return Line(label, [int(row["step"]) for row in there], [row[key] for row in there], held_out)

    def lines(self, panel: Panel) -> list[Line]:
        """All that belongs into a panel."""
        found = [self.line(label, metric) for label, metric in panel.metrics]
        if panel.held_out:
            found.append(self.line("held-out", panel.metrics[0][1], held_out=True))
        return [line for line in found if line is not None]

    def times(self) -> dict[str, float]:
        """Seconds of each part of a step in the mean, evaluations and saving shared out over all steps."""
        steps = max(1, int(self.train[-1]["step"])) if self.train else 1
        found = {}
        for name in TIMES:
            values = [row[f"time/{name}_s"] for row in self.train if f"time/{name}_s" in row]
            if values:
                found[name] = sum(values) / len(values)
        for name in ("evaluate", "save"):
            total = sum(row.get(f"time/{name}_s", 0.0) for row in self.train)
            if total:
                found[name] = total / steps
        return found


def load_series(folders: Sequence[Path]) -> list[RunSeries]:
    """The runs in these folders, or whose config.yaml is given. Raises `ConfigError` for what is none."""
    found = []
    paths = [path.parent if path.is_file() and path.name == RunFolder(path.parent).config.name else path
             for path in folders]  # fmt: skip
    for path, name in zip(paths, short_names(paths), strict=True):
        files = RunFolder(path)
        if not files.metrics.is_file():
            raise ConfigError(f"{path}: no metrics.jsonl; give the output_dir of a run")
        try:
            train, evaluations = read_metrics(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{files.metrics} cannot be read: {error}; delete what is damaged, or give another run"
            ) from error
        if not train and not evaluations:
            raise ConfigError(f"{files.metrics} holds no row yet; wait for the run's first step")
        found.append(RunSeries(name, files, train, evaluations, _settings(path)))
    return found


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; a folder called output says nothing alone."""
    whole = [path.resolve().parts for path in paths]
    first = 2 if any(parts[-1] == "output" for parts in whole) else 1
    for count in range(first, max(map(len, whole), default=1) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts[-1:])} {index + 1}" for index, parts in enumerate(whole)]


def _settings(path: Path) -> RunConfig | None:
    try:
        return open_run(path).run if is_run_folder(path) else None
    except ConfigError:
        return None


def differences(runs: Sequence[RunSeries]) -> list[tuple[str, list[Any]]]:
    """The settings in which runs differ, with each run's value."""
    known = [dict(flat(run.settings.model_dump(mode="json"))) if run.settings else {} for run in runs]
    keys = sorted({key for settings in known for key in settings if key not in ASIDE})
    rows = [(key, [settings.get(key) for settings in known]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def parts_of_data(runs: Sequence[RunSeries]) -> list[Panel]:
    """A panel for each metric that is given apart by source, length or held-out set."""
    panels = []
    for metric, title, unit in (("loss", "Loss", "nats"), ("rewards/accuracies", "Accuracy", "share of pairs"),
                                ("rewards/margins", "Reward margin", "nats")):  # fmt: skip
        for kind in ("source", "length"):
            names = {key.removesuffix(f"/{metric}") for run in runs for row in run.train for key in row
                     if key.startswith(f"{kind}/") and key.endswith(f"/{metric}")}  # fmt: skip
            if len(names) > 1:
                lines = tuple((name.removeprefix(f"{kind}/"), f"{name}/{metric}") for name in sorted(names))
                panels.append(Panel(f"{title} by {kind}", unit, lines))
    return panels


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """The exponential moving average, `weight` being the share of what came before, without the start's bias.

    Values that are not finite are passed over.
    """
    total, norm, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        found.append(total / norm if norm else math.nan)
    return found
