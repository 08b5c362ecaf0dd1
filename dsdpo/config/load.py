"""From RUN.yaml and the command line to a checked `RunConfig`, and back to YAML.

Defaults < RUN.yaml < command line; environment variables set nothing. A relative path means the current working
directory, as in Hugging Face and DeepSpeed; where nothing lies there, the folder of RUN.yaml is tried.
"""

from __future__ import annotations

import argparse
import difflib
import re
import types
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource

from dsdpo.config.data import SourceConfig
from dsdpo.config.run import RunConfig, Section
from dsdpo.errors import ConfigError

COMMAND_LINE = "command line"
MISSING = object()


class RunParser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{COMMAND_LINE}: {message} (see {self.prog} --help)")


class _Help(argparse.HelpFormatter):
    """Help at 100 columns, with defaults written as in YAML."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100, max_help_position=38)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        yaml_words = {"None": "null", "True": "true", "False": "false"}
        return re.sub(r"(?<=default: )(None|True|False)", lambda word: yaml_words[word[0]], action.help or "")


class _CommandLine(RunConfig, BaseSettings):  # type: ignore[misc]
    """The run's settings as command-line options. Never instantiated: that would read environment variables."""


def run_parser(prog: str, description: str) -> RunParser:
    """A parser of RUN.yaml, to which a command adds its own flags before `load_run` adds every setting."""
    parser = RunParser(
        prog=prog,
        usage=f"{prog} [options] RUN.yaml [--section.key value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("run", metavar="RUN.yaml", type=Path, help="the run's settings")
    # The deepspeed launcher passes this to every rank; the rank itself is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def load_run(argv: list[str], parser: RunParser) -> tuple[RunConfig, argparse.Namespace]:
    """The checked run and the command's flags (`flags.run` is the path of RUN.yaml).

    Prints the help made from the typed config and exits on --help. Raises `ConfigError` listing everything wrong.
    """
    options: CliSettingsSource[BaseSettings] = CliSettingsSource(
        _CommandLine,
        root_parser=parser,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_use_class_docs_for_groups=True,
    )
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError("\n".join(_unknown_options(unknown)))
    # Options that were not given are absent here; the command's own flags are no settings.
    settings = set(dotted_keys())
    overrides = options(parsed_args={key: value for key, value in vars(flags).items() if key in settings})()
    content = read_yaml(flags.run)
    try:
        run = RunConfig.model_validate(_merge(content, overrides), context={"folder": flags.run.parent})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, flags.run, overrides) for detail in error.errors())) from None
    return run, flags


def dump_yaml(run: RunConfig) -> str:
    """The run with every value written out; loading it again gives the same run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may stand only once per mapping; PyYAML itself silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands here a second time", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` naming the file, and the line where it is not valid YAML."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a run file: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a text file with YAML in it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {_kind(content)}, but a run file is a mapping of sections such as model:")
    # A section whose every line is commented out stands for its defaults.
    return {key: value for key, value in content.items() if value is not None}


def dotted_keys(section: type[Section] = RunConfig, prefix: str = "") -> list[str]:
    """Every setting's dotted name, each section before what it holds; those inside lists are left out."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _section_in(field.annotation)
        if inner and inner is not SourceConfig:
            keys += dotted_keys(inner, f"{prefix}{name}.")
    return keys


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """'; did you mean X?' with the nearest of `names`, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`, section by section."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over


def _unknown_options(unknown: list[str]) -> Iterator[str]:
    names = [token.split("=")[0] for token in unknown if token.startswith("-")]
    for name in names:
        yield f"{COMMAND_LINE}: {name} is not an option{_nearest(name.lstrip('-'), option='--')}"
    if unknown and not names:
        yield f"{COMMAND_LINE}: {' '.join(unknown)} does not belong to any option"


def _nearest(key: str, option: str = "") -> str:
    """A suggestion for a mistyped dotted key: the same name in another section, else the nearest of all."""
    # The section that it stands in is no advice.
    valid = [name for name in dotted_keys() if not key.startswith(f"{name}.")]
    leaf = key.split(".")[-1]
    elsewhere = [name for name in valid if name.split(".")[-1] == leaf]
    return did_you_mean(option + (elsewhere[0] if elsewhere else key), [option + name for name in valid])


def _explain(error: Any, path: Path, overrides: dict[str, Any]) -> str:
    """One line on one pydantic error: where the value came from, its dotted key, the value and what is allowed."""
    where: Any = path
    given: Any = overrides
    for part in error["loc"]:
        given = given.get(part, MISSING) if isinstance(given, dict) else MISSING
    if error["loc"] and given is not MISSING:
        where = COMMAND_LINE
    key, value = _dotted(error["loc"]), _shown(error["input"])
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "value_error":
            return f"{where}: {message}"
        case "extra_forbidden":
            return f"{where}: {key} is not a setting{_suggestion(error['loc'])}"
        case "missing":
            return f"{where}: {key} is missing{_meaning(error['loc'])}"
        case "model_type" | "model_attributes_type":
            return f"{where}: {key} is {value}, but it is a section of settings{_meaning(error['loc'])}"
        case _:
            return f"{where}: {key} is {value}: {message[0].lower()}{message[1:]}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    """('data', 'train', 0, 'path') as data.train[0].path."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if part != "[key]"
    ).removeprefix(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(loc: tuple[int | str, ...]) -> str:
    """The nearest valid key; inside a list, among the keys of its entries."""
    if not any(isinstance(part, int) for part in loc):
        return _nearest(_dotted(loc))
    section = _section(loc[:-1])
    return did_you_mean(str(loc[-1]), section.model_fields) if section else ""


def _meaning(loc: tuple[int | str, ...]) -> str:
    """What a setting is, in brackets, from its documentation."""
    section = _section(loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    if field is None:
        return ""
    inner = _section(loc)
    text = field.description or (inner.__doc__ if inner else None)
    return f" ({text.rstrip('.')})" if text else ""


def _section(loc: tuple[int | str, ...]) -> type[Section] | None:
    """The section that a location leads to, if it is one."""
    section: type[Section] | None = RunConfig
    for part in loc:
        if isinstance(part, str):
            field = section.model_fields.get(part) if section else None
            section = _section_in(field.annotation) if field else None
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The section type inside an annotation such as `list[SourceConfig] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType):
        return next((section for section in map(_section_in, get_args(annotation)) if section), None)
    return None
