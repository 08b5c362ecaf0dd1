"""`dsdpo completion SHELL`: a script that completes commands, settings and their choices in bash, zsh or fish.

eval "$(dsdpo completion bash)"            # in ~/.bashrc; zsh in ~/.zshrc
dsdpo completion fish > ~/.config/fish/completions/dsdpo.fish
"""

from __future__ import annotations

from typing import Literal, TypeGuard, get_args, get_origin

from dsdpo.commands.table import COMMANDS
from dsdpo.config.load import Help, RunParser, dotted_keys
from dsdpo.config.loss import LOSSES
from dsdpo.config.run import RunConfig
from dsdpo.config.section import Section

SHELLS = ("bash", "zsh", "fish")
# Commands that take a run file and every setting, with options of their own.
RUN_COMMANDS = {
    "train": ("--dry-run", "--verbose", "--resume"),
    "prepare": (),
    "precompute": ("--verbose",),
    "estimate": (
        "--zero",
        "--reference-zero",
        "--ranks",
        "--gpus-per-node",
        "--gpu",
        "--host-memory",
        "--tokens",
        "--json",
    ),
    "compare": ("--zero", "--reference-zero", "--ranks", "--steps", "--limit", "--keep", "--out", "--json"),
}
BASH = """_dsdpo() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" options="{options}"
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{commands}" -- "$word")); return; fi
  case "$before" in
{cases}
  esac
  case "${{COMP_WORDS[1]}} $word" in
{runs}
    *) COMPREPLY=($(compgen -f -- "$word"));;
  esac
}}
complete -o filenames -F _dsdpo dsdpo
"""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = RunParser(prog="dsdpo completion", description=__doc__, formatter_class=Help)
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(argv).shell), end="")
    return 0


def script(shell: str) -> str:
    """The completion script for a shell; zsh runs bash's."""
    options = ["--help", "--help-section", *(f"--{key}" for key in settings())]
    if shell == "fish":
        lines = [f"complete -c dsdpo -n __fish_use_subcommand -f -a {name} -d '{command.summary.split(':')[0]}'"
                 for name, command in COMMANDS.items()]  # fmt: skip
        among = f"-n '__fish_seen_subcommand_from {' '.join(RUN_COMMANDS)}'"
        for option in options:
            values = choices().get(option.removeprefix("--"))
            lines.append(
                f"complete -c dsdpo {among} -l {option[2:]}" + (f" -x -a '{' '.join(values)}'" if values else "")
            )
        for name, own in RUN_COMMANDS.items():
            lines += [f"complete -c dsdpo -n '__fish_seen_subcommand_from {name}' -l {option[2:]}" for option in own]
        return "\n".join(lines) + "\n"
    cases = [f'    --{key}) COMPREPLY=($(compgen -W "{" ".join(values)}" -- "$word")); return;;'
             for key, values in choices().items()]  # fmt: skip
    bash = BASH.format(
        commands=" ".join(COMMANDS),
        cases="\n".join(cases),
        runs="\n".join(
            f'    "{name} --"*) COMPREPLY=($(compgen -W "{" ".join(own)} $options" -- "$word"));;'
            for name, own in RUN_COMMANDS.items()
        ),
        options=" ".join(options),
    )
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + bash


def settings() -> list[str]:
    """Dotted names of all settings that take a value of their own."""
    keys = dotted_keys()
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def choices() -> dict[str, list[str]]:
    """The values of settings that take one of a few, by dotted name."""
    found = {"loss.type": list(LOSSES)}
    for key in settings():
        section: type[Section] = RunConfig
        *outer, last = key.split(".")
        for name in outer:
            section = next(filter(_is_section, _kinds(section.model_fields[name].annotation)))
        kinds = _kinds(section.model_fields[last].annotation)
        values = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        if bool in kinds and not values:
            values = ["true", "false"]
        if values:
            found[key] = values
    return found


def _kinds(annotation: object) -> list[object]:
    """A type and the members of a union, inside annotations."""
    inner = [] if get_origin(annotation) is Literal else list(get_args(annotation))
    return [annotation, *(each for kind in inner for each in _kinds(kind))]


def _is_section(kind: object) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)
