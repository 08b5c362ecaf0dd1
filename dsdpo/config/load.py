"""From RUN.yaml and the command line to a checked `RunConfig`, and back to YAML.

Defaults < RUN.yaml < command line; environment variables set nothing. A relative path means the current working
directory, as in Hugging Face and DeepSpeed; where nothing lies there, the folder of RUN.yaml is tried, and then what
comes with dsdpo (ds_configs/..., launch/recipes/...).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from dsdpo.accelerator import Device
from dsdpo.config.data import SourceConfig
from dsdpo.config.run import RunConfig, Section
from dsdpo.config.section import path_trouble
from dsdpo.config.shipped import page, shipped
from dsdpo.config.unknown_keys import about_unknown, did_you_mean
from dsdpo.config.yaml_file import read_yaml
from dsdpo.errors import ConfigError

__all__ = ["check_run", "did_you_mean", "dotted_keys", "dump_yaml", "load_run", "nested", "read_yaml", "run_parser"]

COMMAND_LINE = "command line"
MOST_ERRORS = 10  # of one run file that are told at once


class RunParser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{COMMAND_LINE}: {message} (see {self.prog} --help)")


LONG_CHOICE = 30  # characters of an option's choices beyond which they stand in its text


class Help(argparse.HelpFormatter):
    """Help as wide as the terminal, 100 columns at most, with defaults written as in YAML."""

    def __init__(self, prog: str) -> None:
        width = max(40, min(100, shutil.get_terminal_size((100, 24)).columns))
        super().__init__(prog, width=width, max_help_position=min(38, width // 3))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        yaml_words = {"None": "null", "True": "true", "False": "false"}
        text = re.sub(r"(?<=default: )(None|True|False)", lambda word: yaml_words[word[0]], action.help or "")
        choices = str(action.metavar or "")
        if choices.startswith("{") and len(choices) > LONG_CHOICE:
            text = f"One of {choices[1:-1].replace(',', ', ')}. {text}"
        return text

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if str(action.metavar or "").startswith("{") and len(str(action.metavar)) > LONG_CHOICE:
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def add_text(self, text: str | None) -> None:
        super().add_text(re.sub(r"^default: null \(undefined\)\s*", "", text or "") or None)


class _CommandLine(RunConfig, BaseSettings):  # type: ignore[misc]
    """The run's settings as command-line options. Never instantiated: that would read environment variables."""


def run_parser(prog: str, description: str) -> RunParser:
    """A parser of RUN.yaml, to which a command adds its own flags before `load_run` adds every setting."""
    parser = RunParser(
        prog=prog,
        usage=f"{prog} [options] RUN.yaml [--section.key value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=Help,
        epilog=f"documentation: {page('')}",
    )
    parser.add_argument("run", metavar="RUN.yaml", type=run_path, help="the run's settings")
    parser.add_argument("--device", action=Device)
    # The deepspeed launcher passes this to every rank; the rank itself is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def run_path(text: str) -> Path:
    """A run file as given, or where it came with dsdpo if there is none."""
    if trouble := path_trouble(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} {trouble}; give a YAML file")
    path = Path(text).expanduser()
    return path if path.exists() else shipped(path) or path


def load_run(argv: list[str], parser: RunParser) -> tuple[RunConfig, argparse.Namespace]:
    """The checked run and the command's flags (`flags.run` is the path of RUN.yaml).

    Prints the help made from the typed config and exits on --help. Raises `ConfigError` listing everything wrong.
    """
    parser.add_argument("--help-section", metavar="NAME", help="show the settings of one section only, such as loss")
    options: CliSettingsSource[BaseSettings] = CliSettingsSource(
        _CommandLine,
        root_parser=parser,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_use_class_docs_for_groups=True,
    )
    if (section := asked_section(argv)) is not None:
        print(section_help(parser, section))
        raise SystemExit(0)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        flags_of_command = [name for action in parser._actions for name in action.option_strings if "." not in name]
        raise ConfigError("\n".join(_unknown_options(unknown, flags_of_command)))
    # Options that were not given are absent here; the command's own flags are no settings.
    settings = set(dotted_keys())
    given = {key: value for key, value in vars(flags).items() if key in settings}
    try:
        overrides = options(parsed_args=given)()
    except SettingsError as error:  # a value that begins as JSON and is none
        raise ConfigError(f"{COMMAND_LINE}: {error}; check brackets and quotes") from None
    return check_run(read_yaml(flags.run), overrides, source=flags.run, folder=flags.run.parent), flags


def asked_section(argv: list[str]) -> str | None:
    """What --help-section is given on a command line; None where it is not there. Raises `ConfigError` for no name."""
    for index, word in enumerate(argv):
        if word.split("=")[0] == "--help-section":
            name = word.partition("=")[2] or next(iter(argv[index + 1 :]), "")
            if not name or name.startswith("-"):
                raise ConfigError(f"{COMMAND_LINE}: --help-section needs a name: {', '.join(sections())}")
            return name
    return None


def sections() -> list[str]:
    """Dotted names of the sections of a run."""
    return sorted({key.rpartition(".")[0] for key in dotted_keys()} - {""})


def section_help(parser: argparse.ArgumentParser, name: str) -> str:
    """The help of one section's settings. Raises `ConfigError` where there is no such section."""
    if name not in sections():
        raise ConfigError(
            f"{COMMAND_LINE}: --help-section {name}: there is no such section{did_you_mean(name, sections())}; there "
            f"are {', '.join(sections())}"
        )
    formatter = parser.formatter_class(prog=parser.prog)
    for group in parser._action_groups:
        if group.title in (f"{name} options", f"{name}") or str(group.title).startswith(f"{name}."):
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def check_run(
    content: dict[str, Any],
    overrides: dict[str, Any],
    *,
    source: str | Path,
    folder: Path | None = None,
    over: str = COMMAND_LINE,
) -> RunConfig:
    """The checked run of nested settings with `overrides` laid over them.

    Errors name `source`, or `over` for what the overrides say; relative paths that lead nowhere are looked for in
    `folder`. Raises `ConfigError` listing everything wrong.
    """
    try:
        run = RunConfig.model_validate(_merge(content, overrides), context={"folder": folder})
    except ValidationError as error:
        details = _by_setting(error.errors())
        found = [_explain(detail, (str(source), over), content, overrides) for detail in details]
        more = [f"{source}: and {len(found) - MOST_ERRORS} more such errors"] if len(found) > MOST_ERRORS else []
        raise ConfigError("\n".join([*found[:MOST_ERRORS], *more])) from None
    for name in run.checkpoint.allow_changes:
        if name not in dotted_keys():
            where = over if _given(("checkpoint", "allow_changes"), overrides) else source
            raise ConfigError(
                f"{where}: checkpoint.allow_changes: {name} is not a setting{about_unknown(name, dotted_keys())}"
            )
    return run


def check_deepspeed_files(run: RunConfig) -> None:
    """Raise `ConfigError` unless the DeepSpeed JSONs that the run names are files: at once, before any import."""
    for key, path in (("deepspeed", run.deepspeed), ("reference.deepspeed", run.reference.deepspeed)):
        if path is not None and not Path(path).is_file():
            what = "no file" if not Path(path).exists() else "not a regular file:"
            raise ConfigError(
                f"{key}: {what} {path} in {Path.cwd()} or beside the run file; give a DeepSpeed JSON such as "
                "ds_configs/zero3.json"
            )


def flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nested(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings with dotted names (`loss.beta`) put into their sections. Raises `ConfigError`, which names `where`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if not isinstance(name, str):
            raise ConfigError(f"{where}: {name!r} is no name of a setting: give texts, such as 'loss.beta'")
        *sections, last = name.split(".")
        if sections and name not in dotted_keys():
            raise ConfigError(f"{where}: {name} is not a setting{about_unknown(name, dotted_keys())}")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{where}: {name} and {section} are both given: give one of them")
        if isinstance(value, Mapping):
            value = {key: str(each) if isinstance(each, os.PathLike) else each for key, each in value.items()}
            place[last] = {**place[last], **value} if isinstance(place.get(last), dict) else value
        else:
            place[last] = str(value) if isinstance(value, os.PathLike) else value
    return found


def dump_yaml(run: RunConfig) -> str:
    """The run with every value written out; loading it again gives the same run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def dotted_keys(section: type[Section] = RunConfig, prefix: str = "") -> list[str]:
    """Every setting's dotted name, each section before what it holds; those inside lists are left out."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _section_in(field.annotation)
        if inner and inner is not SourceConfig:
            keys += dotted_keys(inner, f"{prefix}{name}.")
    return keys


def _merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`, section by section."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over


def _unknown_options(unknown: list[str], flags: list[str]) -> Iterator[str]:
    names = [token.split("=")[0] for token in unknown if token.startswith("-")]
    for name in names:
        near = "" if "." in name else did_you_mean(name.replace("_", "-"), flags, like=0.8)
        letter = len(name.lstrip("-")) == 1  # says nothing of what it may be short for
        about = near or ("" if letter else about_unknown(name.lstrip("-"), dotted_keys(), shown=lambda key: f"--{key}"))
        yield f"{COMMAND_LINE}: {name} is not an option{about}"
    if unknown and not names:
        yield f"{COMMAND_LINE}: {' '.join(unknown)} does not belong to any option"


def _explain(error: Any, places: tuple[str, str], content: dict[str, Any], overrides: dict[str, Any]) -> str:
    """One line on one pydantic error: where the value came from, its dotted key, the value and what is allowed."""
    message = error["msg"].removeprefix("Value error, ")
    where = places[0]
    if _given(error["loc"], overrides):
        where = places[1]
    elif error["type"] == "value_error":
        where = _blamed(message, places, content, overrides)
    key, value = _dotted(error["loc"]), _shown(error["input"])
    match error["type"]:
        case "value_error":
            return f"{where}: {message}"
        case "extra_forbidden":
            return f"{where}: {key} is not a setting{_suggestion(error['loc'])}"
        case "missing":
            return f"{where}: {key} is missing{_meaning(error['loc'])}"
        case "model_type" | "model_attributes_type":
            return f"{where}: {key} is {value}, but it is a section of settings{_meaning(error['loc'])}"
        case "string_type" if isinstance(error["input"], (bool, int, float)):
            return f"{where}: {key} is {value}: input should be a text; in YAML, put it in quotes"
        case _:
            return f"{where}: {key} is {value}: {message[0].lower()}{message[1:]}"


# Where a setting may have several types, pydantic has an error for each, and puts its name into the location.
_TYPE = re.compile(r"str|bool|int|float|(list|dict|literal)\[.*\]")


def _by_setting(errors: Sequence[Any]) -> list[Any]:
    """The errors with one for a value that has none of the types that its setting may have."""
    found: dict[tuple[int | str, ...], list[Any]] = {}
    for error in errors:
        at = next((i for i, part in enumerate(error["loc"]) if i and _TYPE.fullmatch(str(part))), len(error["loc"]))
        rest = error["loc"][at + 1 :]
        found.setdefault(error["loc"][:at], []).append(
            {**error, "loc": (*error["loc"][:at], *rest), "inner": len(rest)}
        )
    told = []
    for group in found.values():
        if inner := [error for error in group if error["inner"]]:  # a list of which only some parts are wrong
            told += inner
        else:
            words = [group[0]["msg"], *(error["msg"].removeprefix("Input should be ") for error in group[1:])]
            told.append({**group[0], "msg": " or ".join(dict.fromkeys(words))} if len(group) > 1 else group[0])
    return told


def _blamed(message: str, places: tuple[str, str], content: dict[str, Any], overrides: dict[str, Any]) -> str:
    """Who gave the settings that a message names as contradicting each other: the file, the command line or both."""
    named = [key.split(".") for key in dotted_keys() if re.search(rf"(?<![\w.-]){re.escape(key)}(?![\w.])", message)]
    if not any(_given(key, overrides) for key in named):
        return places[0]
    from_file = any(_given(key, content) and not _given(key, overrides) for key in named)
    return " and ".join(dict.fromkeys(places)) if from_file else places[1]


def _given(loc: Sequence[int | str], overrides: Any) -> bool:
    """True if `overrides` hold what stands at this place, or what it is a part of."""
    for part in loc:
        if not isinstance(overrides, dict):
            return True
        if part not in overrides:
            return False
        overrides = overrides[part]
    return bool(loc) and not isinstance(overrides, dict)


def _dotted(loc: tuple[int | str, ...]) -> str:
    """('data', 'train', 0, 'path') as data.train[0].path."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if part != "[key]"
    ).removeprefix(".")


def _shown(value: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value, "") if isinstance(value, (bool, type(None))) else ""
    text = text or repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(loc: tuple[int | str, ...]) -> str:
    """The nearest valid key; inside a list, among the keys of its entries."""
    if not any(isinstance(part, int) for part in loc):
        return about_unknown(_dotted(loc), dotted_keys())
    section = _section(loc[:-1])
    return about_unknown(str(loc[-1]), list(section.model_fields)) if section else ""


def _meaning(loc: tuple[int | str, ...]) -> str:
    """What a setting is, in brackets, from its documentation."""
    section = _section(loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    if field is None:
        return ""
    inner = _section(loc)
    text = " ".join((field.description or (inner.__doc__ if inner else None) or "").split())
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
