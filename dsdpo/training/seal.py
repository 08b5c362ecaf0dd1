"""JSON that knows whether it is what was written."""

from __future__ import annotations

import hashlib
import json
from typing import Any

SEAL = "sha256"  # of everything else in it


def sealed(content: dict[str, Any]) -> str:
    """The content as JSON text with its own checksum in it."""
    return json.dumps({**content, SEAL: _digest(content)}, indent=2)


def unsealed(text: str) -> dict[str, Any]:
    """The content of `sealed` text. Raises ValueError where it is not what was written."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop(SEAL, None) != _digest(content):
        raise ValueError("it is not what was written")
    return content


def _digest(content: dict[str, Any]) -> str:
    # As read back: a tuple has become a list, and a number a key.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
