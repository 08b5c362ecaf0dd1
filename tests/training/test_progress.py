"""The bar of a training run, and the words for what is counted."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from dsdpo.console import counted, every
from dsdpo.training.cadence import Progress

METRICS = {"loss": 0.69314, "rewards/accuracies": 0.5, "rewards/margins": 0.01234, "perf/pairs_per_s": 12.34}


@pytest.mark.parametrize(
    ("total", "shown"),
    [
        (2000, "loss 0.693 acc 0.50 margin 0.012 12.3 pairs/s"),
        (2_000_000, "loss 0.693 acc 0.50 margin 0.012"),  # no room for the speed
    ],
)
def test_the_bar_fits_into_80_columns(total: int, shown: str) -> None:
    with Progress(total - 1, total) as progress:
        progress.show(METRICS | {"perf/mfu": 0.4})
        progress.advance()
        line = tqdm.format_meter(**progress._bar.format_dict | {"ncols": 80, "elapsed": 3 * 3600})
    assert line.startswith(f"train {total}/{total} ")
    assert line.rstrip().endswith(f", {shown}")
    assert len(line) <= 80


def test_counts_in_singular_and_plural() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2, 1728)] == ["0 ranks", "1 rank", "2 ranks", "1,728 ranks"]
    assert counted(2, "process", "processes") == "2 processes"
    assert [every(number, "step") for number in (1, 100)] == ["every step", "every 100 steps"]
