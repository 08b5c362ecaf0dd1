"""Which markers a test gets: what its own code, its fixtures and the helpers of tests/ and benchmarks/ reach for.

Nobody has to remember to mark a test. Only `gpu` and `nightly` stand on a test by hand.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

MARKERS = {
    "ranks": "starts a group of ranks (tests/ranks.py)",
    "process": "starts another program",
    "real": "needs the data, models and trajectories of ../shared",
    "gpu": "needs an accelerator",
    "nightly": "seldom says something new for its time: only make test-nightly runs it",
}
# Names that code mentions, as globals, attributes or imports.
OURS = ("tests.", "benchmarks.")
SIGNS = {"run_ranks": "ranks", "subprocess": "process", "multiprocessing": "process", "Forked": "process"}


def markers_of(item: pytest.Item) -> set[str]:
    """The markers of one test; `gpu` and `nightly` stand on it by hand."""
    if not isinstance(item, pytest.Function):
        return set()
    fixtures = item._fixtureinfo.name2fixturedefs  # pytest has no public way to ask for them
    own = [fixture.func for name, all_of_it in fixtures.items() if name != "_end_ranks" for fixture in all_of_it]
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = set(_mentioned([item.function, *own, *values]))
    found = {SIGNS[name] for name in names & SIGNS.keys()}
    if "shared" in fixtures:
        found.add("real")
    return found


def _mentioned(roots: Iterable[Any]) -> Iterator[str]:
    """Every name in the code of these functions and of our own helpers that they call."""
    seen: set[types.CodeType] = set()
    waiting = list(roots)
    while waiting:
        function = waiting.pop()
        function = getattr(function, "__wrapped__", function)  # below a context manager or a cache
        if not isinstance(function, types.FunctionType) or not function.__module__.startswith(OURS):
            continue
        for code in _nested(function.__code__):
            if code in seen:
                continue
            seen.add(code)
            yield from code.co_names
            waiting += _named(code.co_names, function.__globals__)


def _named(names: Iterable[str], module: dict[str, Any]) -> Iterator[Any]:
    """What the names stand for: globals, and what is taken out of modules of our own, imported on the spot or not."""
    spots = [module, *(vars(importlib.import_module(name)) for name in names if name.startswith(OURS))]
    spots += [vars(module[name]) for name in names if isinstance(module.get(name), types.ModuleType)]
    for spot in spots:
        yield from (spot[name] for name in names if name in spot)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code itself and that of every function defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)
