"""Waiting for a rank that works: as long as it takes, while it gives signs of life."""

from __future__ import annotations

import time
from typing import Any

from dsdpo import distributed
from dsdpo.distributed import on_some_ranks, rank
from dsdpo.errors import DataError, DsdpoError
from tests.ranks import run_ranks


def _work(seconds: float, signs_every: float, error: Exception | None, silent_s: float) -> Any:
    before, distributed.SIGN_S = distributed.SIGN_S, signs_every

    def work() -> str:
        time.sleep(seconds)
        if error is not None:
            raise error
        return f"made by {rank()}"

    try:
        return on_some_ranks(rank() == 0, work, silent_s=silent_s)
    except DsdpoError as failure:
        return type(failure), str(failure)
    finally:
        distributed.SIGN_S = before


def test_ranks_wait_for_one_that_works_while_it_gives_signs_of_life() -> None:
    assert run_ranks(2, _work, 4.0, 0.1, None, 2.0) == ["made by 0", None]
    assert run_ranks(2, _work, 0.0, 0.1, DataError("no rows"), 30.0) == [(DataError, "no rows")] * 2
    both = run_ranks(2, _work, 4.0, 60.0, None, 1.0)
    assert [kind for kind, _ in both] == [DsdpoError] * 2
    assert both[1][1].startswith("rank 0")
    assert "gave no sign of life for 1 s" in both[1][1]
