"""The house rules that can be read off the source: which room may import which, and who may import whom outside."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import dsdpo

PACKAGE = Path(dsdpo.__file__).parent
ROOMS = ["config", "data", "objective", "engine", "estimate", "reference", "training", "run", "commands"]
BELOW = (  # all rooms
    "accelerator", "atomic", "errors", "distributed", "disks", "console", "phases", "run_folder", "run_lock",
    "host_memory", "sequence_group", "stop_signals", "stop_request", "time_limit",
)  # fmt: skip
BELOW_ALL = {"dsdpo", *(f"dsdpo.{name}" for name in BELOW)}
ALLOWED = {
    "deepspeed": ("engine/",),
    "wandb": ("training/wandb_mirror.py",),
    "peft": ("engine/", "reference/adapter.py"),
    "accelerate": (),
    "trl": (),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if is_module(inside) else str(node.module)


def is_module(name: str) -> bool:
    """True for a file or room of the package."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("dsdpo") and (path.with_suffix(".py").is_file() or path.is_dir())


def room(name: str) -> int:
    """How far down a module stands: it may import what has a smaller number, or the same room."""
    parts = name.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else len(ROOMS)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_rooms_import_downwards_only() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in FILES
        for name in imports(path)
        if name.startswith("dsdpo") and name not in BELOW_ALL and room(name) > room(module_name(path))
    ]
    assert not wrong
    below = [PACKAGE / f"{name}.py" for name in BELOW]
    assert {name for path in below for name in imports(path) if name.startswith("dsdpo")} <= BELOW_ALL


def test_no_cycles() -> None:
    graph = {module_name(path): {name for name in imports(path) if is_module(name)} for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for inner in graph.get(name, ()):
                visit(inner, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in FILES
        for name in imports(path)
        if name.split(".")[0] in ALLOWED
        and not str(path.relative_to(PACKAGE)).startswith(ALLOWED[name.split(".")[0]] or ("nowhere",))
    ]
    assert not wrong


def test_modules_of_our_own_are_imported_at_the_top() -> None:
    """But where torch must wait: `import dsdpo`, and the command line before a command is known."""
    for path in FILES:
        functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        inner = {node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)}
        own = sorted({node.module for node in inner if node.module and node.module.startswith("dsdpo")})
        assert not own or path.name in ("api.py", "__main__.py"), f"{path}: {own}"


def test_the_file_map_in_the_docs_names_every_file_and_no_other() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = text[text.index("\ndsdpo/\n") + len("\ndsdpo/\n") : text.index("\nds_configs/")].splitlines()
    lists = [re.sub(r"\(.*?\)", "", re.split(r"\s{2,}", row)[-1]) for row in rows]  # behind the folder and its meaning
    named = {name for row in lists for name in re.split(r"[\s·→]+", row) if name and not name.endswith("/")}
    assert named == {
        path.stem for path in FILES if not {"quirks", "losses"} & set(path.parts) and "__" not in path.name
    }


def test_the_map_in_the_readme_is_that_of_the_folders() -> None:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```\n(dsdpo/.*?)```", readme, re.DOTALL)
    assert found
    assert " → ".join(ROOMS) in found[1]
    named = re.findall(r"(\w+)/(?=\s)", found[1])
    assert set(ROOMS) <= set(named)
    assert not [name for name in named if not any((at / name).is_dir() for at in (PACKAGE, PACKAGE.parent))]


def test_files_and_functions_stay_small() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{path}: {node.name}"


def test_no_clock_that_can_be_set() -> None:
    """Deadlines and durations are measured on `time.monotonic` and `time.perf_counter`."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.now")
    ]
    assert not wrong
