"""docs/deepspeed-quirks.md names code and tests that exist, and every module of engine/quirks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/deepspeed-quirks.md").read_text()


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", PAGE)
    assert len(named) > 10
    for path, parts in named:
        text = (ROOT / path).read_text()
        for part in parts.split("::")[1:]:
            assert re.search(rf"(def|class) {part}\b", text), (path, part)


def test_every_file_that_the_page_names_is_there() -> None:
    for path in re.findall(r"`(engine/[\w/.]+\.(?:py|json))`", PAGE):
        assert (ROOT / "dsdpo" / path).is_file(), path


def test_no_module_of_quirks_is_left_out() -> None:
    for path in (ROOT / "dsdpo/engine/quirks").glob("*.py"):
        assert path.name == "__init__.py" or path.stem in PAGE, path


def test_page_is_of_the_version_that_the_keys_are_of() -> None:
    from dsdpo.engine.deepspeed_keys import TESTED_VERSION

    assert f"**{TESTED_VERSION}**" in PAGE
