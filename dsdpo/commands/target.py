"""What commands on RUN or MODEL are given: a run folder, its config.yaml, a run file, a model folder or a Hub id.

Checked without importing torch.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dsdpo.commands.parsing import path_or_id, plain_parser, user_path
from dsdpo.config.data import SourceConfig
from dsdpo.config.load import RunParser, load_run, run_parser
from dsdpo.config.reference import ReferenceConfig
from dsdpo.config.run import RunConfig
from dsdpo.console import launched
from dsdpo.data.condition import SCORES, Condition
from dsdpo.errors import ConfigError
from dsdpo.run_folder import RunFolder


@dataclass(frozen=True)
class Target:
    """What a command works on."""

    run: RunConfig
    folder: Path | None  # of a run that has been trained; None: a model, or a run that has not
    sources: list[SourceConfig]  # the pairs to take, as --data says or else the run's held-out ones
    name: str  # as errors name it


@dataclass(frozen=True)
class EvaluateArguments:
    """Of `dsdpo evaluate`."""

    target: Target
    checkpoint: str | None  # of a run: last, best or a step; None: the exported model, else the last
    out: Path | None  # JSON file to write
    verbose: bool


def evaluate(argv: list[str]) -> EvaluateArguments:
    """The arguments of `dsdpo evaluate`. Raises `ConfigError`; exits on --help."""
    text = "Held-out metrics of a trained policy, or of a model beside a reference."
    parser = target_parser("dsdpo evaluate", text)
    parser.add_argument("--out", type=user_path, metavar="FILE", help="JSON file to write")
    target, given = load_target(argv, parser)
    if given.out is not None and not given.out.absolute().parent.is_dir():
        raise ConfigError(f"--out: there is no folder {given.out.absolute().parent}; make it, or choose another")
    return EvaluateArguments(target, given.checkpoint, given.out, given.verbose)


@dataclass(frozen=True)
class ScoreArguments:
    """Of `dsdpo score`."""

    target: Target
    checkpoint: str | None  # of a run: last, best or a step; None: the exported model, else the last
    out: Path  # table to write, in Parquet
    tokens: bool  # a row has the log-prob of each token too
    condition: Condition | None  # of the pairs that are written; None: all
    rows: Path | None  # JSONL to write with the kept pairs' rows as they stood in their files
    by: str | None  # column of the rows that pairs are grouped by
    rewardbench: bool
    verbose: bool


def score(argv: list[str]) -> ScoreArguments:
    """The arguments of `dsdpo score`. Raises `ConfigError`; exits on --help."""
    parser = target_parser("dsdpo score", "Log-probs, rewards and margin of each pair, as a table.")
    add = parser.add_argument
    add("--out", type=user_path, required=True, metavar="F.parquet", help="table to write, a row for each pair")
    add("--tokens", action="store_true", help="also the id and log-prob of each token of the responses")
    add("--keep", metavar="CONDITION", help="write only pairs for which this is true, e.g. 'margin > 0.1 and right'")
    add(
        "--rows", type=user_path, metavar="F.jsonl", help="also write the kept pairs' rows as they stood in their files"
    )
    add("--by", metavar="COLUMN", help="also say the share of right pairs by what this column of the rows holds")
    add("--rewardbench", action="store_true", help="the data is RewardBench's: say its sections (by subset)")
    target, given = load_target(argv, parser)
    condition = _checked(given)
    if given.tokens and target.run.distributed.sequence_parallel > 1:
        raise ConfigError("--tokens: needs whole rows on each rank: add --distributed.sequence_parallel 1")
    return ScoreArguments(
        _as_reward_bench(target) if given.rewardbench else target,
        given.checkpoint,
        given.out,
        tokens=given.tokens,
        condition=condition,
        rows=given.rows,
        by="subset" if given.rewardbench else given.by,
        rewardbench=given.rewardbench,
        verbose=given.verbose,
    )


def _checked(given: Namespace) -> Condition | None:
    for name, path, suffix in (("--out", given.out, ".parquet"), ("--rows", given.rows, ".jsonl")):
        if path is None:
            continue
        if path.suffix != suffix or path.is_dir():
            raise ConfigError(f"{name}: {path} is no {suffix} file; give a path that ends so")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{name}: there is no folder {path.absolute().parent}; make it, or choose another")
    for path in given.data or ():
        if given.rows is not None and given.rows.resolve() == Path(path).expanduser().resolve():
            raise ConfigError(f"--rows: {path} is read; choose another file")
    if given.rewardbench and given.by:
        raise ConfigError("--by and --rewardbench both group the pairs: keep one")
    if given.keep is None:
        return None
    condition = Condition(given.keep, key="--keep")
    condition.check_columns(SCORES)
    return condition


def _as_reward_bench(target: Target) -> Target:
    """The target with RewardBench's texts put into the chat template; of a Hub id or folder the split `filtered`."""
    data = target.run.data.model_copy(update={"text": "chat"})
    run: RunConfig = target.run.model_copy(update={"data": data})
    sources = [
        source if source.split or Path(source.path).expanduser().is_file()
        else source.model_copy(update={"split": "filtered"})
        for source in target.sources
    ]  # fmt: skip
    return Target(run, target.folder, sources, target.name)


def target_parser(prog: str, description: str | None) -> RunParser:
    """A parser for a command on a run or a model; `description` is its module's docstring."""
    parser = plain_parser(prog, description)
    parser.usage = f"{prog} RUN|MODEL [options] [--section.key value ...]"
    parser.epilog = "Every setting of dsdpo train --help can be given by its dotted name, e.g. --loss.beta 0.2."
    parser.add_argument(
        "target", metavar="RUN|MODEL", help="run folder, its config.yaml, a run file, a model or Hub id"
    )
    parser.add_argument("--data", action="append", metavar="PATH", help="pairs; may be given several times")
    parser.add_argument(
        "--columns", metavar="JSON", help='our column names to the file\'s, e.g. {"prompt": "question"}'
    )
    parser.add_argument("--checkpoint", help="of a run: last, best or a step; default: the exported model, else last")
    parser.add_argument("--reference", metavar="MODEL", help="folder or Hub id of the model to compare with")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers have to say")
    return parser


def load_target(argv: list[str], parser: RunParser) -> tuple[Target, Namespace]:
    """What the first word of the command line names, with every setting of the rest. Raises `ConfigError`."""
    flags, rest = parser.parse_known_args(argv)
    given = Path(path_or_id(flags.target)).expanduser()
    folder: Path | None = None
    config = RunFolder(given).config
    if given.is_dir() and config.is_file():
        folder, run_file = given, config
    elif given.suffix in (".yaml", ".yml") or given.is_file():
        run_file = given
        folder = given.parent if given.name == config.name and RunFolder(given.parent).metrics.is_file() else None
    else:
        return _model(flags, rest), flags
    run = _loaded(run_file, rest, parser.prog)
    if folder is None and RunFolder(run.output_dir).config.is_file():
        folder = Path(run.output_dir)  # the run of this file has been trained
    if folder is not None:
        run = run.model_copy(update={"output_dir": str(folder)})
    if flags.reference is not None:
        run = _with_reference(run, flags.reference)
    return Target(run, folder, _sources(run, flags), str(run_file)), flags


def _loaded(run_file: Path, rest: list[str], prog: str) -> RunConfig:
    """The run with the settings that the command's own options have left of the command line."""
    run, _ = load_run([str(run_file), *rest], run_parser(prog, ""))
    return run


def _model(flags: Namespace, rest: list[str]) -> Target:
    """A model without a run: the settings are the defaults and what the command line says."""
    name: str = flags.target
    folder = Path(tempfile.mkdtemp(prefix="dsdpo-"))
    several = launched().world_size > 1
    for file, stage in (("policy.json", 3 if several else 1), ("reference.json", 3 if several else 0)):
        # overlap_comm needs a second stream, of which a CPU has none.
        zero = {"stage": stage} | ({"overlap_comm": False} if file == "policy.json" else {})
        (folder / file).write_text(json.dumps({"zero_optimization": zero}))
    content = {
        "model": {"path": name},
        "data": {"train": "given by --data"},
        "reference": {"deepspeed": str(folder / "reference.json")},
        "deepspeed": str(folder / "policy.json"),
        "output_dir": str(folder / "run"),
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(content))
    run = _loaded(folder / "model.yaml", rest, "dsdpo")
    if not flags.data:
        raise ConfigError("command line: --data is missing: a model has no pairs of its own; give the path of a file")
    if flags.checkpoint is not None:
        raise ConfigError(
            f"command line: --checkpoint {flags.checkpoint} is for runs, and {name} is a model: leave it out"
        )
    if flags.reference is not None:
        run = _with_reference(run, flags.reference)
    elif run.loss.reference_use == "unused" and run.reference.path is None:
        run = run.model_copy(update={"reference": ReferenceConfig(strategy="none")})
    elif run.reference_strategy() != "none":
        raise ConfigError(
            f"command line: --reference is missing: {name} is a model, and loss.type {' + '.join(run.loss.types)} "
            "compares it with another; give one, or --loss.type cpo for rewards without a reference"
        )
    return Target(run, None, _sources(run, flags), name)


def _with_reference(run: RunConfig, model: str) -> RunConfig:
    """The run against another reference, as it is."""
    settings = {"strategy": "separate", "path": model, "deepspeed": run.reference.deepspeed,
                "score_tokens": run.reference.score_tokens}  # fmt: skip
    try:
        return RunConfig.model_validate({**run.model_dump(mode="json"), "reference": settings})
    except ValidationError as error:
        raise ConfigError(f"--reference {model}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _sources(run: RunConfig, flags: Namespace) -> list[SourceConfig]:
    columns: Any = None
    if flags.columns is not None:
        try:
            columns = json.loads(flags.columns)
        except ValueError as error:
            raise ConfigError(f"--columns {flags.columns!r} is no JSON ({error})") from None
    if not flags.data:
        if not run.data.eval:
            raise ConfigError("command line: --data is missing, and the run has no data.eval: give the path of a file")
        return list(run.data.eval) if columns is None else _made([s.path for s in run.data.eval], columns, None)
    known = {source.path: source for source in [*run.data.train, *(run.data.eval or ())]}
    if columns is None and all(path in known for path in flags.data):
        return [known[path].model_copy(update={"weight": 1.0}) for path in flags.data]
    like = next(iter(run.data.train), None)
    return _made(flags.data, columns if columns is not None else (like.columns if like else None), like)


def _made(paths: Sequence[str], columns: Any, like: SourceConfig | None) -> list[SourceConfig]:
    values = like.preferred_values.model_dump() if like is not None and like.preferred_values else None
    try:
        return [
            SourceConfig.model_validate(
                {
                    "path": path,
                    "columns": columns,
                    "preferred_values": values if columns == (like and like.columns) else None,
                }
            )
            for path in paths
        ]
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(f"--data or --columns: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
