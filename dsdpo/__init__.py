"""DeepSpeed-native Direct Preference Optimization.

From Python: `from dsdpo import Run, train, evaluate, register_loss`; docs/python.md shows how. Nothing heavy is
imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Run": "dsdpo.api",
    "Result": "dsdpo.api",
    "train": "dsdpo.api",
    "evaluate": "dsdpo.api",
    "read_result": "dsdpo.api",
    "score": "dsdpo.api",
    "register_loss": "dsdpo.objective.losses.registered",
    "PairLogps": "dsdpo.objective.logps",
    "Event": "dsdpo.training.callbacks",
    "DsdpoError": "dsdpo.errors",
}
__all__ = [
    "DsdpoError",
    "Event",
    "PairLogps",
    "Result",
    "Run",
    "evaluate",
    "read_result",
    "register_loss",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dsdpo' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
