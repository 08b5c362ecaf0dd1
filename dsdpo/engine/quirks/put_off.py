"""A state that is written later: pickled by torch at once, with its storages copied into host memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import serialization

Write = Callable[[], None]
"""Writes a file whose content is there already. Raises OSError."""


class HostCopies:
    """Host memory for copies, kept from one save to the next: most of a copy's time goes into new pages."""

    def __init__(self) -> None:
        self._spare: dict[int, list[torch.UntypedStorage]] = {}  # by bytes

    def of(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """A copy of a storage in host memory."""
        spare = self._spare.get(storage.nbytes())
        copy = spare.pop() if spare else torch.UntypedStorage(storage.nbytes())
        return copy.copy_(storage, non_blocking=False)

    def give_back(self, copy: torch.UntypedStorage) -> None:
        """Keep the memory of a copy that `of` made for the next of its size."""
        self._spare.setdefault(copy.nbytes(), []).append(copy)


def put_off(state: Any, path: str, copies: HostCopies) -> Write:
    """What writes `state` as it is now to `path`, byte for byte as `torch.save` would write it now.

    Storages on a device are copied by torch, into pinned memory that its allocator keeps. torch has no public way of
    stopping between pickling and writing (2.13, torch/serialization.py, `_save`).
    """
    records = _Records(copies)
    options: Any = serialization.config
    with options.patch("save.use_pinned_memory_for_d2h", True):
        torch.serialization._save(state, records, pickle, torch.serialization.DEFAULT_PROTOCOL, False)
    return partial(records.write, path)


class _Records:
    """Stands in for torch's writer of zip archives: keeps the entries that it is given."""

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies
        self._kept: list[tuple[str, Any, int, bool]] = []  # name, content, bytes, whether it is a copy of ours

    def write_record(self, name: str, content: Any, size: int) -> None:
        # What nobody else holds is a copy already, which torch has made of a storage on a device.
        live = isinstance(content, torch.UntypedStorage) and torch._C._storage_Use_Count(content._cdata) > 1
        self._kept.append((name, self._copies.of(content) if live else content, size, live))

    def write(self, path: str) -> None:
        """Write the archive, and let go of the entries. Raises OSError."""
        kept, self._kept = self._kept, []
        try:
            with torch.serialization._open_zipfile_writer(path) as archive:
                for name, content, size, _ in kept:
                    archive.write_record(name, content, size)
        except RuntimeError as error:  # which torch makes of an OSError
            raise OSError(str(error)) from error
        finally:
            for _, content, _, ours in kept:
                if ours:
                    self._copies.give_back(content)
