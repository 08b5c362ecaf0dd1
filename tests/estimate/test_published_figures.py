"""The table of docs/memory.md beside other trainers' published memory: our side of each row is today's forecast."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.estimate.published import SETTINGS, forecast

TABLE = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)
SLOW = (  # 4 to 8 s
    *("ALST 500k", "ALST 3.7M", "ALST 15M", "360-LLaMA-Factory 14B, 72k", "360-LLaMA-Factory 72B, 86k"),
    *("ms-swift 30B-A3B, all weights", "Tülu 3 70B"),
)
NAMES = [pytest.param(name, marks=pytest.mark.nightly) if name in SLOW else name for name in SETTINGS]
OURS = {name: figure for name, _, figure, _ in TABLE if name in SETTINGS}


def test_every_setting_has_a_row() -> None:
    assert OURS.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_our_side_of_a_published_figure(name: str, tmp_path: Path) -> None:
    found = forecast(SETTINGS[name], tmp_path)
    assert OURS[name] == f"{found.device / 2**30:.1f}"
