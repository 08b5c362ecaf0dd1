"""`dsdpo convert --from trl|axolotl|llamafactory|openrlhf FILE`: a run file from another program's settings.

What has no counterpart is listed, with what to do. Settings may follow, as in `--data.train pairs.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import yaml

from dsdpo.atomic import write_text
from dsdpo.commands.parsing import user_path
from dsdpo.config.conversion import Conversion
from dsdpo.config.convert import PROGRAMS, convert, silent
from dsdpo.config.load import Help, RunParser, check_run, dotted_keys, nested
from dsdpo.config.script import value_of
from dsdpo.config.unknown_keys import about_unknown
from dsdpo.console import counted
from dsdpo.errors import ConfigError

ORDER = ("model", "data", "loss", "reference", "optimizer", "batch", "train", "evaluation", "checkpoint", "export",
         "tracking", "distributed", "deepspeed", "output_dir", "overwrite_output_dir")  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = RunParser(prog="dsdpo convert", description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("file", type=user_path, help="their YAML file, or a shell script")
    parser.add_argument("--from", dest="program", choices=PROGRAMS, required=True, help="whose settings these are")
    parser.add_argument("--out", type=user_path, default=Path("run.yaml"),
                        help="run file to write; default: run.yaml")  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, help="processes of the run, for the size of a step; default: 8")
    parser.add_argument("--force", action="store_true", help="overwrite the run file if it is there")
    parser.add_argument("--json", action="store_true", help="print what became of each setting as JSON")
    given, rest = parser.parse_known_args(argv)
    if given.gpus < 1:
        raise ConfigError(f"convert: --gpus is {given.gpus}: give 1 or more")
    if given.out.exists() and not given.force:
        raise ConfigError(f"convert: {given.out} is there already: give another --out, or --force")
    found = convert(given.file, given.program, gpus=given.gpus)
    overrides = nested(overrides_of(rest), "command line")
    check_run(found.run, overrides, source=given.file, folder=given.file.parent)
    write(given, found, overrides)
    print(as_json(found) if given.json else described(given, found))
    return 0


def overrides_of(words: list[str]) -> dict[str, Any]:
    """`--section.key value ...` as settings by dotted name. Raises `ConfigError`."""
    found = {}
    for option, value in zip(words[::2], [*words[1::2], None], strict=False):
        name = option.removeprefix("--")
        if not option.startswith("--") or name not in dotted_keys():
            raise ConfigError(f"convert: {option} is not an option{about_unknown(name, dotted_keys())}")
        if value is None:
            raise ConfigError(f"convert: {option} needs a value")
        found[name] = value_of(value)
    return found


def write(given: argparse.Namespace, found: Conversion, overrides: dict[str, Any]) -> None:
    """Write the run file. Raises `ConfigError`."""
    run = laid_over(found.run, overrides)
    ordered = in_order({key: run[key] for key in ORDER if key in run})
    lines = [f"# Converted from {given.file.name} ({given.program}) by dsdpo convert. Without an exact counterpart:"]
    lines += [f"#   {what}    ({why})" for what, why in found.missed()] or ["#   nothing"]
    if idle := found.idle():
        lines += ["# Of no consequence here: " + ", ".join(idle)]
    text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=120)
    try:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.out, "\n".join(lines) + "\n" + text)
    except OSError as error:
        raise ConfigError(f"convert: {given.out} cannot be written ({error}): give another --out") from error


def in_order(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of each section as they stand in the help; what is no section stays as it is."""
    places = {key: place for place, key in enumerate(dotted_keys())}
    names = sorted(section, key=lambda name: places.get(prefix + name, 0)) if prefix else list(section)
    return {
        name: in_order(value, f"{prefix}{name}.") if isinstance(value := section[name], dict) else value
        for name in names
    }


def laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    return base | {
        key: laid_over(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def as_json(found: Conversion) -> str:
    """What became of each setting, for programs."""
    left = [{"theirs": what, "why": why} for what, why in found.missed()]
    taken = [{"theirs": what, "ours": ours} for what, ours in found.taken]
    return json.dumps({"taken": taken, "left": left, "of_no_consequence": found.idle()}, indent=2)


def described(given: argparse.Namespace, found: Conversion) -> str:
    """What became of each setting, and what to type next."""
    wide = shutil.get_terminal_size().columns
    width = min(30, max((len(what) for what, _ in found.taken), default=0))
    lines = [
        line
        for what, ours in found.taken
        for line in textwrap.wrap(
            ours, wide, initial_indent=f"{shorten(what, width):<{width}}  ", subsequent_indent=" " * (width + 4)
        )
    ]
    if missed := found.missed():
        lines += ["", f"without an exact counterpart ({counted(len(missed), 'setting')}):"]
        for what, why in missed:
            lines += [
                shorten(f"  {what}", wide),
                *textwrap.wrap(why, wide - 6, initial_indent=" " * 6, subsequent_indent=" " * 6),
            ]
    notes = []
    if idle := found.idle():
        notes.append(f"of no consequence here: {', '.join(idle)}")
    if found.defaults:
        values = ", ".join(f"{name} {value}" for name, value in found.defaults.items())
        notes.append(f"not in the file, so as {given.program} has it: {values}")
    if left_out := silent(found.run):
        notes.append(f"not in the file, so dsdpo's own default: {', '.join(left_out)}")
    for note in notes:
        lines += ["", *textwrap.wrap(note, wide, subsequent_indent="  ")]
    lines += ["", f"wrote {given.out}; check it with: dsdpo train {given.out} --dry-run"]
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    """Text that fits into so many columns."""
    return text if len(text) <= width else f"{text[: width - 3]}..."
