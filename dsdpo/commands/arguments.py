"""The commands, and what those that take a run file are given on the command line, checked without importing torch."""

from __future__ import annotations

import os
import re
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.load import Help, RunParser, check_deepspeed_files, load_run, run_parser
from dsdpo.config.reference import Precomputed
from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError


def plain_parser(prog: str, description: str | None) -> RunParser:
    """A parser for a command without settings of its own; `description` is its module's docstring."""
    text = (description or "").split(": ", 1)[-1].split("\n\n")[0]
    parser = RunParser(prog=prog, description=text[:1].upper() + text[1:], allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=SUPPRESS)  # the launcher's
    return parser


def user_path(text: str) -> Path:
    """A path from the command line, whose ~ is the user's home folder."""
    return Path(text).expanduser()


def new_folder(folder: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Path:
    """The folder, if it may be written. Raises `ConfigError` if it holds inputs, or is not to be replaced."""
    for path in inputs:
        if path.exists() and folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConfigError(f"--out: {folder} holds {path}, which is read: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file: choose another")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"--out: {folder} is not empty: choose another folder, or add --overwrite to replace it")
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"--out: {folder} cannot be written: {existing} is no folder that this user may write to")
    return folder


COMMANDS = {
    "train": "train a policy on preference pairs: dsdpo train RUN.yaml",
    "init": "write a run file, DeepSpeed JSONs and a start script to begin with: dsdpo init FOLDER",
    "convert": "make a run file of another program's settings: dsdpo convert --from trl FILE",
    "prepare": "tokenize a run's data, on a machine without a GPU if need be: dsdpo prepare RUN.yaml",
    "precompute": "score all pairs with the reference, for training to find: dsdpo precompute RUN.yaml",
    "inspect": "a run's pairs as they are trained on: dsdpo inspect RUN.yaml",
    "evaluate": "held-out metrics of a trained policy: dsdpo evaluate RUN|MODEL --data FILE",
    "score": "log-probs, rewards and margins of pairs as a table: dsdpo score RUN|MODEL --data FILE --out F.parquet",
    "export": "write a checkpoint of a run as a model folder: dsdpo export RUN --out FOLDER",
    "merge": "merge a LoRA adapter into its base model: dsdpo merge ADAPTER BASE --out FOLDER",
    "demo": "make a small model and data set, train on two ranks and show what happened",
    "plot": "draw the metrics of runs: dsdpo plot RUN ...",
    "report": "runs side by side as one page: dsdpo report RUN ... --html FILE",
    "completion": "print a script that completes commands and settings: dsdpo completion bash",
}


@dataclass(frozen=True)
class TrainArguments:
    """Of `dsdpo train`."""

    run: RunConfig
    run_file: Path
    dry_run: bool
    verbose: bool


@dataclass(frozen=True)
class PrecomputeArguments:
    """Of `dsdpo precompute`."""

    run: RunConfig
    run_file: Path
    shard_pairs: int | None  # pairs that a rank scores between writes; None: the store's default
    verbose: bool


def train(argv: list[str]) -> TrainArguments:
    """The arguments of `dsdpo train`. Raises `ConfigError`; exits on --help."""
    parser = run_parser("dsdpo train", "Train a policy on preference pairs, anchored to a reference model.")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers have to say")
    argv = [re.sub(r"^--resume(?==|$)", "--checkpoint.resume", word) for word in argv]
    run, flags = load_run(argv, parser)
    check_deepspeed_files(run)
    return TrainArguments(run, flags.run, dry_run=flags.dry_run, verbose=flags.verbose)


def precompute(argv: list[str]) -> PrecomputeArguments:
    """The arguments of `dsdpo precompute`. Raises `ConfigError`; exits on --help."""
    parser = run_parser("dsdpo precompute", "Score all pairs of a run with its reference, into the store.")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers have to say")
    parser.add_argument(
        "--shard-pairs", type=int, default=None, help="pairs that a rank scores between writes; a kill costs as many"
    )
    run, flags = load_run(argv, parser)
    check_deepspeed_files(run)
    if not isinstance(plan_reference(run).settings, Precomputed):
        raise ConfigError(
            f"{flags.run}: reference.strategy is {run.reference.strategy}, under which training would not use what "
            "dsdpo precompute stores: set it to precomputed, here and for training"
        )
    if flags.shard_pairs is not None and flags.shard_pairs < 1:
        raise ConfigError(f"--shard-pairs is {flags.shard_pairs}: give 1 or more")
    return PrecomputeArguments(run, flags.run, shard_pairs=flags.shard_pairs, verbose=flags.verbose)


# Commands whose modules import torch, DeepSpeed and transformers: seconds that a typing error need not wait.
PARSERS: dict[str, Callable[[list[str]], Any]] = {"train": train, "precompute": precompute}
