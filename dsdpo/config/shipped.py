"""The DeepSpeed JSONs, recipes, start scripts and pages that come with the package, as they do with the repository."""

from __future__ import annotations

import os
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "shipped"  # links in the repository, files of their own in an installed wheel
FOLDERS = ("ds_configs", "launch")


def shipped(path: str | os.PathLike[str]) -> Path | None:
    """What comes with dsdpo under a path such as ds_configs/zero3.json, if it does."""
    parts = Path(path).parts
    found = SHIPPED / path
    return found if parts and parts[0] in FOLDERS and ".." not in parts and found.exists() else None


def page(name: str) -> str:
    """Where a page is, such as hints.md or hints.md#truncation: docs/... in the repository's folder, else its path."""
    path = (SHIPPED / "docs").resolve() / name
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def recipes() -> dict[str, Path]:
    """The run files in launch/recipes by name."""
    return {path.stem: path for path in sorted((SHIPPED / "launch" / "recipes").glob("*.yaml"))}


def deepspeed_jsons(folder: str = "") -> dict[str, Path]:
    """The policy's DeepSpeed JSONs by name, such as zero3_offload; those of the reference in the folder `reference`."""
    return {path.stem: path for path in sorted((SHIPPED / "ds_configs" / folder).glob("*.json"))}
