"""What a run reads must not lie in what it deletes or replaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.config.section import path_trouble
from dsdpo.errors import ConfigError
from dsdpo.run_folder import RunFolder

OUTPUTS = ("output_dir", "checkpoint.resume")  # settings that name what the run itself writes


def check_inputs_stay(run: RunConfig, run_file: str | Path) -> None:
    """Raise `ConfigError` if anything that the run reads lies in what it would delete, links followed."""
    folder = RunFolder(run.output_dir)
    what = "overwrite_output_dir would delete" if run.overwrite_output_dir else "the export at the end would replace"
    going = folder.existing() if run.overwrite_output_dir else [folder.model, folder.merged]
    home = folder.path.resolve()
    inputs = [*named_values(run.model_dump(mode="json")), ("the run file", str(run_file))]
    for key, text in inputs:
        if key in OUTPUTS or path_trouble(text) or not Path(text).expanduser().exists():
            continue
        place = Path(text).expanduser().resolve()
        for target in going:
            if target.resolve() in (place, *place.parents) or (place == home and target.exists()):
                raise ConfigError(
                    f"{key}: {text} lies in {target}, which {what}: choose another output_dir, or copy it elsewhere "
                    "and name the copy"
                )


def named_values(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text among the settings, which may be a path, with its dotted name."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from named_values(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from named_values(inner, f"{key}[{index}]")
    elif isinstance(value, str) and value:
        yield key, value
