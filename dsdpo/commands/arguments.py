"""What commands that take a run file are given on the command line, checked without importing torch."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path

from dsdpo.commands.parsing import above_0, at_least_1, new_folder, path_or_id, plain_parser, user_path
from dsdpo.config.load import RunParser, check_deepspeed_files, load_run, run_parser
from dsdpo.config.reference import Precomputed
from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import DistributedConfig, RunConfig
from dsdpo.errors import ConfigError
from dsdpo.estimate.hardware import GPUS, hardware
from dsdpo.run_folder import RunFolder


@dataclass(frozen=True)
class TrainArguments:
    """Of `dsdpo train`."""

    run: RunConfig
    run_file: Path
    dry_run: bool
    verbose: bool
    quiet: bool = False


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
    parser.add_argument("--quiet", action="store_true", help="say nothing but warnings, errors and where the model is")
    argv = [re.sub(r"^--resume(?==|$)", "--checkpoint.resume", word) for word in argv]
    run, flags = load_run(argv, parser)
    if flags.quiet and (flags.dry_run or flags.verbose):
        raise ConfigError("command line: --quiet goes with neither --dry-run nor --verbose: leave one out")
    check_deepspeed_files(run)
    return TrainArguments(run, flags.run, dry_run=flags.dry_run, verbose=flags.verbose, quiet=flags.quiet)


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


@dataclass(frozen=True)
class EstimateArguments:
    """Of `dsdpo estimate`."""

    run: RunConfig
    run_file: Path
    policies: tuple[str, ...]  # DeepSpeed JSONs
    references: tuple[str | None, ...]  # None: the run's own, or derived from the policy's
    ranks: int | None  # None: as many as were started
    per_node: int | None
    gpu: str | None  # None: this machine's
    host_memory: float | None  # GiB of a node
    tokens: tuple[int, ...] | None  # of prompt and responses; None: from the run's data
    as_json: bool


def estimate(argv: list[str]) -> EstimateArguments:
    """The arguments of `dsdpo estimate`. Raises `ConfigError`; exits on --help."""
    parser = run_parser("dsdpo estimate", "Forecast memory and speed of a run, without GPUs, weights or data.")
    add_machine_options(parser)
    add_config_options(parser)
    parser.add_argument(
        "--tokens", metavar="P,C,R", default=None, help="lengths of prompt, chosen and rejected; default: of the data"
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print everything as JSON, in bytes")
    run, flags = load_run(argv, parser)
    if not flags.policies:
        check_deepspeed_files(run)
    policies, references = config_files(run, flags)
    return EstimateArguments(
        run,
        flags.run,
        policies,
        references,
        ranks=at_least_1(flags.ranks, "--ranks"),
        per_node=at_least_1(flags.per_node, "--gpus-per-node"),
        gpu=known_gpu(flags.gpu),
        host_memory=above_0(flags.host_memory, "--host-memory"),
        tokens=None if flags.tokens is None else pair_tokens(flags.tokens, run),
        as_json=flags.as_json,
    )


@dataclass(frozen=True)
class CompareArguments:
    """Of `dsdpo compare RUN.yaml`."""

    run: RunConfig
    run_file: Path
    policies: tuple[str, ...]  # DeepSpeed JSONs
    references: tuple[str | None, ...]  # None: the run's own, or derived from the policy's
    ranks: int | None  # None: every GPU of this machine, without any 2
    steps: int
    limit_s: float  # of a trial
    keep: Path | None  # folder for what trials write; None: nothing is kept
    out: Path  # the suggestion
    as_json: bool
    trial: Path | None  # this process is a rank of a trial, which leaves its figures in this folder


@dataclass(frozen=True)
class FinishedArguments:
    """Of `dsdpo compare RUN RUN ...`."""

    folders: tuple[Path, ...]
    as_json: bool


def compare(argv: list[str]) -> CompareArguments | FinishedArguments:
    """The arguments of `dsdpo compare`, of whichever form. Raises `ConfigError`; exits on --help."""
    words = [word for word in argv if word != "--json" and not word.startswith("--local")]
    given = list(takewhile(lambda word: not word.startswith("-"), words))
    if len(given) > 1 or (given and Path(path_or_id(given[0])).expanduser().is_dir()):
        return _finished(argv)
    parser = run_parser("dsdpo compare", COMPARE)
    add_config_options(parser)
    parser.add_argument(
        "--ranks", type=int, default=None, metavar="N", help="of a trial; default: a GPU each, or 2 without GPU"
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="of a trial, 2 or more; default: 5")
    parser.add_argument(
        "--limit", type=float, default=30.0, metavar="MIN", help="minutes after which a trial is ended; default: 30"
    )
    parser.add_argument(
        "--keep", type=user_path, default=None, metavar="FOLDER", help="keep settings, logs and metrics of trials here"
    )
    parser.add_argument(
        "--out", type=user_path, default=None, metavar="FILE", help="the suggestion; default: RUN.suggested.yaml"
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print everything as JSON, in bytes")
    parser.add_argument("--trial", type=Path, default=None, help=argparse.SUPPRESS)
    run, flags = load_run(argv, parser)
    if not flags.policies:
        check_deepspeed_files(run)
    policies, references = config_files(run, flags)
    if flags.steps < 2:
        raise ConfigError(f"--steps is {flags.steps}: give 2 or more, as the first step is not timed")
    limit = above_0(flags.limit, "--limit", "minutes")
    out = flags.out or Path(f"{flags.run.stem}.suggested.yaml")
    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"--out: {out} is no file that can be written; give one in a folder that is there")
    if out.resolve() == flags.run.resolve():
        raise ConfigError(f"--out: {out} is the run file itself, which would be replaced: choose another file")
    if flags.trial is None and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("dsdpo compare starts its trials' ranks itself: leave out the launcher, and say --ranks N")
    return CompareArguments(
        run,
        flags.run,
        policies,
        references,
        ranks=at_least_1(flags.ranks, "--ranks"),
        steps=flags.steps,
        limit_s=60.0 * (limit or 0.0),
        keep=None if flags.keep is None else new_folder(flags.keep, option="--keep"),
        out=out,
        as_json=flags.as_json,
        trial=flags.trial,
    )


COMPARE = (
    "Try a run for a few steps under each pair of DeepSpeed JSONs, in processes of their own, and say which fit, what "
    "they take and how fast they are. `dsdpo compare RUN RUN ... [--json]` lays finished runs side by side instead."
)


def _finished(argv: list[str]) -> FinishedArguments:
    parser = plain_parser("dsdpo compare", "compare: Finished runs side by side: settings, results, speed and memory.")
    parser.add_argument("run", metavar="RUN", type=user_path, nargs="+", help="output_dir of a run")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print everything as JSON")
    given = parser.parse_args(argv)
    if len(given.run) < 2:
        raise ConfigError(
            f"dsdpo compare {given.run[0]}: one finished run has nothing beside it: give two or more, or a run file to "
            "try under several DeepSpeed JSONs"
        )
    return FinishedArguments(tuple(given.run), given.as_json)


def add_machine_options(parser: RunParser) -> None:
    """The options that say what a run is to run on."""
    parser.add_argument("--ranks", type=int, default=None, metavar="N", help="GPUs in all; default: as launched, or 1")
    parser.add_argument(
        "--gpus-per-node", type=int, default=None, dest="per_node", metavar="N", help="default: 8, or all if fewer"
    )
    parser.add_argument(
        "--gpu", default=None, metavar="NAME", help=f"{', '.join(GPUS)} or cpu; default: this machine's"
    )
    parser.add_argument(
        "--host-memory", type=float, default=None, metavar="GIB", help="of a node; default: not a limit"
    )


def add_config_options(parser: RunParser) -> None:
    """The options that name DeepSpeed JSONs to choose from."""
    parser.add_argument(
        "--zero", nargs="+", default=[], dest="policies", metavar="JSON", help="for the policy; default: the run's own"
    )
    parser.add_argument(
        "--reference-zero", nargs="+", default=[], dest="references", metavar="JSON",
        help="for the reference; default: the run's own, else derived from the policy's",
    )  # fmt: skip


def config_files(run: RunConfig, flags: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """The DeepSpeed JSONs of policy and reference to choose from. Raises `ConfigError` for what is no file."""
    for option, words in (("--zero", flags.policies), ("--reference-zero", flags.references)):
        for word in words:
            if not Path(word).is_file():
                raise ConfigError(f"{option}: no file {word}; give DeepSpeed JSONs, such as ds_configs/zero*.json")
    if flags.references and not plan_reference(run).own_engine:
        raise ConfigError(
            f"--reference-zero has no effect with reference.strategy {run.reference_strategy()}, whose reference has "
            "no engine: leave it out"
        )
    references: tuple[str | None, ...] = tuple(flags.references) or (run.reference.deepspeed,)
    return tuple(flags.policies) or (run.deepspeed,), references


def known_gpu(name: str | None) -> str | None:
    """The name, once it is found in the table. Raises `ConfigError`."""
    if name is not None:
        hardware(name, ranks_per_node=1)
    return name


def pair_tokens(text: str, run: RunConfig) -> tuple[int, ...]:
    """Tokens of prompt and responses. Raises `ConfigError` for other words, and for what the run would cut."""
    words = text.split(",")
    responses = {"rated": 1, "pairs": 2}.get(run.loss.rows)
    shape = {"rated": "PROMPT,RESPONSE", "pairs": "PROMPT,CHOSEN,REJECTED"}.get(run.loss.rows, "PROMPT,BEST,...,WORST")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words) or (
        len(words) - 1 != responses if responses else len(words) < 3
    ):
        raise ConfigError(
            f"--tokens {text}: give numbers of tokens from 1 up as {shape}, such as "
            f"{'512,256,256'[: 3 + 4 * (responses or 2)]}"
        )
    tokens = tuple(int(word) for word in words)
    if tokens[0] + max(tokens[1:]) > run.data.max_length:
        raise ConfigError(
            f"--tokens {text}: prompt and response have {tokens[0] + max(tokens[1:]):,} tokens, and data.max_length "
            f"{run.data.max_length:,} would cut them: give shorter ones, or raise --data.max_length"
        )
    return (*tokens, 0) if run.loss.rows == "rated" else tokens


@dataclass(frozen=True)
class DoctorArguments:
    """Of `dsdpo doctor`."""

    run: RunConfig | None
    run_file: Path | None
    as_json: bool

    @property
    def timeout_minutes(self) -> float:
        """How long ranks wait for each other."""
        return self.run.distributed.timeout_minutes if self.run else DistributedConfig().timeout_minutes

    @property
    def lost_after(self) -> timedelta:
        """How long a rank may be silent."""
        return self.run.distributed.lost_after if self.run else DistributedConfig().lost_after


def doctor(argv: list[str]) -> DoctorArguments:
    """The arguments of `dsdpo doctor`, whose run file may be left out. Raises `ConfigError`; exits on --help."""
    text = "Look for what would stop a run or slow it down, here or on every node of a launcher."
    parser = run_parser("dsdpo doctor", text)
    parser.add_argument("--json", action="store_true", help="print every finding as JSON")
    if all(word.startswith("--local") or word == "--json" for word in argv):
        return DoctorArguments(None, None, as_json="--json" in argv)
    run, flags = load_run(argv, parser)
    check_deepspeed_files(run)
    return DoctorArguments(run, flags.run, as_json=flags.json)


@dataclass(frozen=True)
class PrepareArguments:
    """Of `dsdpo prepare`."""

    run: RunConfig
    run_file: Path


def prepare(argv: list[str]) -> PrepareArguments:
    """The arguments of `dsdpo prepare`. Raises `ConfigError`; exits on --help."""
    parser = run_parser("dsdpo prepare", "Tokenize a run's data into data.cache_dir; no model and no DeepSpeed needed.")
    run, flags = load_run(argv, parser)
    return PrepareArguments(run, flags.run)


@dataclass(frozen=True)
class InspectArguments:
    """Of `dsdpo inspect`."""

    run: RunConfig
    held_out: bool  # the pairs of data.eval in place of those of data.train
    row: int | None  # of the data: what it has become
    worst: bool
    sample: int  # pairs to show
    tokens: bool  # each with its id
    ranks: int  # that packing is predicted for
    color: str  # "auto", "always" or "never"
    html: Path | None  # page to write


def inspect(argv: list[str]) -> InspectArguments:
    """The arguments of `dsdpo inspect`. Raises `ConfigError`; exits on --help."""
    parser = plain_parser("dsdpo inspect", INSPECT)
    parser.usage = "dsdpo inspect RUN.yaml [options] [--section.key value ...]"
    add = parser.add_argument
    add("run", metavar="RUN.yaml", type=user_path, help="run file, or the folder of a run")
    add("--eval", action="store_true", help="the held-out pairs in place of those of training")
    add("--row", type=int, metavar="N", help="show what row N of the data, counted from 0, has become")
    add("--worst", action="store_true", help="show the pairs that lost most to truncation, else the longest")
    add("--sample", type=int, default=3, metavar="N", help="pairs to show, of all lengths; default: 3")
    add("--tokens", action="store_true", help="show each token with its id")
    add("--ranks", type=int, default=1, metavar="N", help="ranks that packing is predicted for; default: 1")
    add("--color", choices=["auto", "always", "never"], default="auto", help="default: auto, in a terminal")
    add("--html", type=user_path, metavar="FILE", help="also write all of it as one page")
    given, rest = parser.parse_known_args(argv)
    for name, value, least in (("--row", given.row, 0), ("--sample", given.sample, 0), ("--ranks", given.ranks, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}: give {least} or more")
    if given.row is not None and given.worst:
        raise ConfigError("--row and --worst both choose the pairs: keep one")
    if given.html is not None and (given.html.is_dir() or not given.html.absolute().parent.is_dir()):
        raise ConfigError(f"--html: {given.html} is no file that can be written; give one in a folder that is there")
    config = RunFolder(given.run).config
    run_file = config if given.run.is_dir() and config.is_file() else given.run
    run, _ = load_run([str(run_file), *rest], run_parser(parser.prog, ""))
    return InspectArguments(
        run, given.eval, given.row, given.worst, given.sample, given.tokens, given.ranks, given.color, given.html
    )


INSPECT = (
    "A run's pairs as they are trained on: what is in them, and some of them token by token. In colour: prompt, what "
    "both responses begin with, chosen, rejected, and what is read but not learned."
)
