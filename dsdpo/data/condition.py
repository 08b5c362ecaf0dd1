"""A condition on the columns of a table, such as `margin > 0.1 and chosen_tokens < 500`, without Python's eval."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsdpo.errors import ConfigError

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.USub: operator.neg, ast.And: np.logical_and, ast.Or: np.logical_or,
    ast.Not: np.logical_not,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": np.abs, "min": np.minimum, "max": np.maximum}
SCORES = [
    "source", "row", "prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_logp", "rejected_logp",
    "reference_chosen_logp", "reference_rejected_logp", "chosen_reward", "rejected_reward", "margin", "right", "loss",
]  # fmt: skip
"""Columns of the table that `dsdpo score` writes, which its conditions are about."""
LONGEST = 1000  # characters


class Condition:
    """Comparisons of columns and numbers joined by and, or, not; with + - * /, abs(x), min(x, y) and max(x, y)."""

    def __init__(self, text: str, *, key: str) -> None:
        """Raises `ConfigError`, which names `key`, for what is no such condition."""
        self.text, self._key = text, key
        try:
            if len(text) > LONGEST:
                raise SyntaxError(f"longer than {LONGEST} characters")
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._wrong(f"cannot be read ({getattr(error, 'msg', None) or error})") from None
        self.columns = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)} - FUNCTIONS.keys()
        self._check(self._tree)

    def check_columns(self, known: Mapping[str, Any] | list[str]) -> None:
        """Raise `ConfigError` unless every column is one of these."""
        if unknown := sorted(self.columns - set(known)):
            raise self._wrong(f"has no column {unknown[0]}; there are {', '.join(known)}")

    def holds(self, table: Mapping[str, np.ndarray]) -> np.ndarray:
        """(n,) bool: for which rows of the columns it is true; not for those whose numbers are NaN."""
        self.check_columns(table)
        size = len(next(iter(table.values())))
        try:
            with np.errstate(all="ignore"):
                found = np.asarray(self._value(self._tree, table))
        except (TypeError, ValueError, OverflowError) as error:
            raise self._wrong(f"does not suit its columns ({error})") from None
        if found.dtype != np.bool_:
            raise self._wrong("is a number, not a comparison; write e.g. margin > 0.1")
        return np.broadcast_to(found, (size,)).copy()

    def _check(self, node: ast.AST) -> None:
        match node:
            case ast.BoolOp(values=values):
                inner = list(values)
            case ast.Compare(left=left, comparators=others):
                inner = [left, *others]
            case ast.BinOp(left=left, right=right):
                inner = [left, right]
            case ast.UnaryOp(operand=operand):
                inner = [operand]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                if len(arguments) != (1 if name == "abs" else 2):
                    raise self._wrong(f"gives {name} {len(arguments)} values")
                inner = list(arguments)
            case ast.Name() | ast.Constant(value=bool() | int() | float() | str()):
                return
            case _:
                raise self._wrong(f"holds {ast.unparse(node)!r}, which is no part of a condition")
        operators = getattr(node, "ops", None) or ([node.op] if hasattr(node, "op") else [])
        for each in operators:
            if type(each) not in OPERATORS:
                raise self._wrong(f"holds the operator of {ast.unparse(node)!r}, which is no part of a condition")
        for part in inner:
            self._check(part)

    def _value(self, node: Any, table: Mapping[str, np.ndarray]) -> Any:
        match node:
            case ast.BoolOp():
                found = self._value(node.values[0], table)
                for part in node.values[1:]:
                    found = OPERATORS[type(node.op)](found, self._value(part, table))
                return found
            case ast.Compare():
                values = [self._value(part, table) for part in (node.left, *node.comparators)]
                found = True
                for index, each in enumerate(node.ops):
                    found = np.logical_and(found, OPERATORS[type(each)](values[index], values[index + 1]))
                return found
            case ast.BinOp():
                return OPERATORS[type(node.op)](self._value(node.left, table), self._value(node.right, table))
            case ast.UnaryOp():
                return OPERATORS[type(node.op)](self._value(node.operand, table))
            case ast.Call(func=ast.Name(id=name)):
                return FUNCTIONS[name](*(self._value(part, table) for part in node.args))
            case ast.Name():
                return table[node.id]
        return np.float64(node.value) if type(node.value) in (int, float) else node.value

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._key}: {self.text[:200]!r} {what}")
