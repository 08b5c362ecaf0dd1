"""What commands that write model folders are given on the command line, checked without importing torch."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from dsdpo.commands.parsing import new_folder, path_or_id, plain_parser, user_path
from dsdpo.config.load import RunParser
from dsdpo.config.model import ModelConfig
from dsdpo.errors import ConfigError
from dsdpo.run.finished import FinishedRun, open_run

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Output:
    """The model folder that a command writes."""

    folder: Path
    memory_bytes: int  # for weights on their way
    shard_bytes: int  # of a weight file at most


@dataclass(frozen=True)
class ExportArguments:
    """Of `dsdpo export`."""

    run: FinishedRun
    output: Output
    checkpoint: str  # last, best or a step
    merge: bool  # an adapter into its base
    dtype: str | None  # None: the run's
    push_to_hub: str | None  # id of a repository on the Hub
    public: bool  # if it is a new one


def export(argv: list[str]) -> ExportArguments:
    """The arguments of `dsdpo export`. Raises `ConfigError`; exits on --help."""
    parser = plain_parser("dsdpo export", "A checkpoint of a run, stopped or finished, as a Hugging Face model folder.")
    parser.add_argument("run", metavar="RUN", type=user_path, help="output_dir of a run, or the config.yaml in it")
    _add_output(parser)
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: last")
    parser.add_argument("--merge", action="store_true", help="of an adapter: write the base with it merged in")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the run's model.dtype")
    parser.add_argument("--push-to-hub", metavar="ID", help="then upload it to this Hub repository")
    parser.add_argument("--public", action="store_true", help="make a new Hub repository public; default: private")
    given = parser.parse_args(argv)
    if given.public and not given.push_to_hub:
        parser.error("--public has no effect without --push-to-hub")
    run = open_run(given.run)
    if given.merge and run.run.model.lora is None:
        raise ConfigError(f"--merge: {run.folder} trained all weights, so there is no adapter to merge: leave it out")
    output = _output(parser, given, inputs=[run.folder.path])
    return ExportArguments(run, output, given.checkpoint, given.merge, given.dtype, given.push_to_hub, given.public)


@dataclass(frozen=True)
class MergeArguments:
    """Of `dsdpo merge`."""

    adapter: Path
    base: ModelConfig
    output: Output


def merge(argv: list[str]) -> MergeArguments:
    """The arguments of `dsdpo merge`. Raises `ConfigError`; exits on --help."""
    parser = plain_parser("dsdpo merge", "A LoRA adapter merged into its base model, as a model folder.")
    parser.add_argument("adapter", metavar="ADAPTER", type=user_path, help="adapter folder, such as model/ of a run")
    parser.add_argument("base", metavar="BASE", help="folder or Hub id of the model that it was trained on")
    _add_output(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the merged weights; default: bfloat16")
    parser.add_argument("--revision", help="Hub branch, tag or commit of BASE")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with BASE")
    given = parser.parse_args(argv)
    base = ModelConfig(
        path=given.base, revision=given.revision, dtype=given.dtype, trust_remote_code=given.trust_remote_code
    )
    output = _output(parser, given, inputs=[given.adapter, Path(path_or_id(given.base)).expanduser()])
    return MergeArguments(given.adapter, base, output)


def _add_output(parser: RunParser) -> None:
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in FOLDER")
    parser.add_argument(
        "--memory", type=int, default=256, metavar="MIB", help="for weights on their way, in MiB; default: 256"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file; default: 5")


def _output(parser: RunParser, given: Namespace, *, inputs: list[Path]) -> Output:
    """Where to write. Raises `ConfigError` for a folder that holds inputs or is not to be replaced."""
    if given.memory < 1 or not 0 < given.shard_gb < math.inf:
        parser.error("--memory and --shard-gb must be above 0")
    folder = new_folder(given.out, overwrite=given.overwrite, inputs=inputs)
    return Output(folder, given.memory * 2**20, int(given.shard_gb * 1e9))
