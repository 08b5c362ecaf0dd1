"""Which reference a run has: found out once its weights are loaded, said, and written into the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsdpo.console import say
from dsdpo.distributed import all_or_none, rank
from dsdpo.reference.base import Reference


def record_identity(reference: Reference, folder: Path, *, overridden: list[str]) -> dict[str, Any]:
    """Say which reference this is, write it into the run folder, and return it as JSON. Collective.

    Without a reference nothing is written, and the answer is empty.
    `overridden` says in what it is not the one that training began with.
    """
    if reference.identity is None:  # there is no reference
        return {}
    say(f"reference: {reference.identity.describe()}")
    content = reference.identity.to_json() | ({"overridden": overridden} if overridden else {})
    with all_or_none():
        if rank() == 0:
            (folder / "identity.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content
