"""What each command that takes a run file is given on the command line, checked without importing torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.load import check_deepspeed_files, load_run, run_parser
from dsdpo.config.reference import Precomputed
from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError


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
