"""Conditions on columns: what they mean, and that nothing else can be written in them."""

from __future__ import annotations

import numpy as np
import pytest

from dsdpo.data.condition import Condition
from dsdpo.errors import ConfigError

TABLE = {
    "margin": np.array([-1.0, 0.05, 0.5, np.nan]),
    "tokens": np.array([3, 10, 20, 30]),
    "right": np.array([False, True, True, True]),
    "source": np.array(["a", "a", "b", "b"], dtype=object),
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("margin > 0.1", [2]),
        ("margin > 0.1 or tokens <= 3", [0, 2]),
        ("not right", [0]),
        ("right and source == 'a'", [1]),
        ("0 < margin < 1", [1, 2]),
        ("abs(margin) >= 0.5 and tokens / 2 - 1 < 10", [0, 2]),
        ("max(margin, 0) == 0", [0]),
        ("-margin * 2 + 1 > 0", [0, 1]),
        ("margin != margin", [3]),
        ("True", [0, 1, 2, 3]),
    ],
)
def test_rows_that_a_condition_keeps(text: str, kept: list[int]) -> None:
    assert np.flatnonzero(Condition(text, key="--keep").holds(TABLE)).tolist() == kept


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("margin >", "cannot be read"),
        ("margn > 1", "has no column margn; there are margin"),
        ("__import__('os').system('true')", "no part of a condition"),
        ("margin.real > 1", "no part of a condition"),
        ("[m for m in margin]", "no part of a condition"),
        ("margin ** 9", "the operator of"),
        ("margin in source", "the operator of"),
        ("sum(margin) > 1", "no part of a condition"),
        ("abs(margin, 1) > 1", "gives abs 2 values"),
        ("margin + 1", "is a number, not a comparison"),
        ("source > 1", "does not suit its columns"),
        ("margin > 0 and " * 100 + "right", "longer than"),
    ],
)
def test_what_is_no_condition(text: str, mentions: str) -> None:
    with pytest.raises(ConfigError, match=r"^--keep: ") as caught:
        Condition(text, key="--keep").holds(TABLE)
    assert mentions in str(caught.value)
