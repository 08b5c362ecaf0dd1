"""The date that a chat template is told: decided once, so that another day gives the same tokens."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import date
from pathlib import Path

from dsdpo.config.data import DataConfig
from dsdpo.data.render import Renderer
from dsdpo.data.tokenize import cache_folder, template_digest
from dsdpo.data.types import Tokenizer


def settled_date(data: DataConfig, tokenizer: Tokenizer) -> str | None:
    """`data.date`, else the day on which data was first prepared with this template in this cache, as YYYY-MM-DD.

    That day is noted in the cache on the first call. None where the template does not ask for the date.
    """
    if not Renderer(tokenizer).asks_for_date:
        return None
    if data.date is not None:
        return data.date
    today = date.today().isoformat()
    note = cache_folder(data) / f"date-{template_digest(tokenizer)[:32]}"
    with suppress(OSError):  # a cache that cannot be written is refused where it is needed
        note.parent.mkdir(parents=True, exist_ok=True)
        _write_once(note, today)
        return date.fromisoformat(note.read_text(encoding="utf-8").strip()).isoformat()
    return today


def _write_once(path: Path, text: str) -> None:
    """Write the file unless it is there; of several processes the first one's text stands."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
