"""The commands of launch/README.md, as they stand there."""

from __future__ import annotations

import re

from tests.cluster.hosts import ROOT


def command_of(title: str) -> str:
    """The first shell command of a section of launch/README.md."""
    text = (ROOT / "launch" / "README.md").read_text()
    section = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"launch/README.md has no section {title!r}"
    block = re.search(r"```bash\n(.*?)```", section[1], re.DOTALL)
    assert block, f"no command under {title!r} in launch/README.md"
    return block[1]
