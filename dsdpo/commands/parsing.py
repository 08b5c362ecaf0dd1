"""What the command lines of several commands have in common, read without importing torch."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from dsdpo.config.load import Help, RunParser
from dsdpo.config.section import path_trouble
from dsdpo.errors import ConfigError


def plain_parser(prog: str, description: str | None) -> RunParser:
    """A parser for a command without settings of its own; `description` is its module's docstring."""
    text = (description or "").split(": ", 1)[-1].split("\n\n")[0]
    parser = RunParser(prog=prog, description=text[:1].upper() + text[1:], allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)  # the launcher's
    return parser


def user_path(text: str) -> Path:
    """A path from the command line, whose ~ is the user's home folder. Raises `ArgumentTypeError` for no path."""
    if trouble := path_trouble(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} {trouble}; give another path")
    return Path(text).expanduser()


def path_or_id(text: str) -> str:
    """A path or Hub id from the command line. Raises `ConfigError` for what can be neither."""
    if trouble := path_trouble(text):
        raise ConfigError(f"command line: {text[:80]!r} {trouble}; give another path, or a Hub id")
    return text


def new_folder(
    folder: Path, *, overwrite: bool | None = None, inputs: Sequence[Path] = (), option: str = "--out"
) -> Path:
    """The folder, if it may be written. Raises `ConfigError` if it holds inputs, or is not to be replaced.

    `overwrite` is None for commands that replace nothing.
    """
    for path in inputs:
        if path.exists() and folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConfigError(f"{option}: {folder} holds {path}, which is read: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option}: {folder} is a file: choose another")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        replace = "" if overwrite is None else ", or add --overwrite to replace it"
        raise ConfigError(f"{option}: {folder} is not empty: choose another folder{replace}")
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"{option}: {folder} cannot be written: {existing} is no folder that this user may write to")
    return folder


def at_least_1(value: int | None, option: str) -> int | None:
    """The value of an option that counts something. Raises `ConfigError` for less than 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{option} is {value}: give 1 or more")
    return value


def above_0(value: float | None, option: str, unit: str = "GiB") -> float | None:
    """The value of an option, in `unit`. Raises `ConfigError` for nothing above 0."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{option} is {value}: give {unit}, above 0")
    return value
