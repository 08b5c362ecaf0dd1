"""Reading RUN.yaml: YAML 1.2's plain scalars, each key once, and an end to what would take for ever."""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dsdpo.errors import ConfigError

MAX_BYTES = 10_000_000
MAX_VALUES = 100_000  # with aliases written out
MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand only once per mapping; PyYAML itself silently keeps the last.

    Plain scalars mean what they mean in YAML 1.2: 010 is ten, 12:00 and 2024-01-01 are texts, yes and no too.
    """

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


_BRACKETS = re.compile(rf"(?:[\[{{]\s*(?:\w*\s*:)?\s*){{{MAX_DEPTH + 10}}}")


def _decimal_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0) if re.match(r"[-+]?0[xob]", text) else int(text)


_Loader.yaml_implicit_resolvers = {}
_NUMBER = [*"-+.0123456789"]
for _tag, _pattern, _first_letters in (
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)", _NUMBER),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?", _NUMBER),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", _NUMBER),
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first_letters)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` naming the file, and the line where it is not valid YAML."""
    if path.suffix in (".py", ".ipynb"):
        raise ConfigError(
            f"{path} is Python and starts with python; a run file is YAML, such as launch/recipes/demo.yaml"
        )
    text = _text(path)
    try:
        if _BRACKETS.search(text):  # PyYAML would take seconds to say so
            raise RecursionError
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_size(node, path)
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested more than {MAX_DEPTH} deep; a run file is sections of settings") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not a text file with YAML in it") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of a tag that its value does not fit
        raise ConfigError(f"{path}: not valid YAML: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: holds {kind}, but a run file is a mapping of sections such as model:")
    # A section whose every line is commented out stands for its defaults.
    return {key: value for key, value in content.items() if value is not None}


def _text(path: Path) -> str:
    """What the file says, if it is one that every rank can read. Raises `ConfigError`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device, which only one rank could read"
            raise ConfigError(f"{path}: cannot be read as a run file: it is {kind}; give a YAML file")
        if found.st_size > MAX_BYTES:
            raise ConfigError(f"{path}: {found.st_size} bytes; a run file has at most {MAX_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a run file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file with YAML in it") from error


def _check_size(root: yaml.Node | None, path: Path) -> None:
    """Raise `ConfigError` where aliases multiply, or contain themselves, or the nesting has no end."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in above:
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: an alias stands within what it is an alias of")
        if depth > MAX_DEPTH:
            raise RecursionError
        above.add(id(node))
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value  # nodes, or pairs of key and value
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        above.discard(id(node))
        if sizes[id(node)] > MAX_VALUES:
            raise ConfigError(f"{path}: its aliases stand for more than {MAX_VALUES} values; write them out")
        return sizes[id(node)]

    if root is not None:
        size(root, 0)
