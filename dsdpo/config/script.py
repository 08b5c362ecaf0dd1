"""The settings in a shell script that starts another program's training."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from dsdpo.errors import ConfigError

# Dotted names whose last part alone would say something else.
OPENRLHF = {"ref.model_name_or_path": "ref_pretrain", "ref.offload": "ref_offload", "ref.deepspeed": "ref_deepspeed"}


def read_script(path: Path) -> dict[str, Any]:
    """The options of the command in a shell script: `--name value`, `--name=value`, or `--name` for true.

    Variables that the script sets to plain text are put in. Raises `ConfigError`.
    """
    try:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        words = shlex.split(text, comments=True)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a shell script ({error})") from None
    variables = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Za-z_]\w*=[^$]*", word, re.S))

    def known(word: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), word)

    options: dict[str, Any] = {}
    last = None
    for word in map(known, words):
        if word.startswith("--"):
            last, _, value = word[2:].partition("=")
            options[last] = value_of(value) if value else True
            last = None if value else last
        elif last is not None and not re.match(r"-+[A-Za-z]", word):
            value = value_of(word.rstrip(","))
            options[last] = (
                value
                if options[last] is True
                else [*(options[last] if isinstance(options[last], list) else [options[last]]), value]
            )
        else:
            last = None
    return {name.split(".")[-1] if name not in OPENRLHF else OPENRLHF[name]: value for name, value in options.items()}


def value_of(word: str) -> Any:
    """A word of a command line as the number or truth value that it spells, else as it is."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
