"""The table of docs/memory.md beside other trainers' published memory: our side of each row is today's forecast."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.estimate.published import SETTINGS, forecast

TABLE = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)
OURS = {name: figure for name, _, figure, _ in TABLE if name in SETTINGS}


def test_every_setting_has_a_row() -> None:
    assert OURS.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_our_side_of_a_published_figure(name: str, tmp_path: Path) -> None:
    found = forecast(SETTINGS[name], tmp_path)
    assert OURS[name] == f"{found.device / 2**30:.1f}"
