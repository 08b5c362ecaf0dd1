"""Files and folders that are whole or not there, and the checksums that tell.

Importing this needs nothing else of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHECKSUM = "sha256"  # in a checksummed JSON object: of everything else in it


def partial_path(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write in place of `path`: flushed to the disk and renamed at the end, deleted after an error.

    `shared`: other processes may write the same path meanwhile; each has a partial file of its own.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}") if shared else partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Write a file atomically. Raises OSError."""
    with replacing(path, shared=shared) as file:
        file.write(content)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file atomically. Raises OSError."""
    write_bytes(path, text.encode(), shared=shared)


def write_json(path: Path, content: Any, *, shared: bool = False) -> None:
    """Write JSON for people to read, atomically. Raises OSError."""
    write_text(path, json.dumps(content, indent=2) + "\n", shared=shared)


def publish(made: Path, folder: Path) -> None:
    """Rename a finished folder to its place; one that another process has put there first is kept. Raises OSError."""
    try:
        made.rename(folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not folder.is_dir():
            raise


def delete(path: Path) -> None:
    """Delete a file or a folder with all in it; nothing may be there. Of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_atomically(folder: Path, *, by_way_of: Path) -> None:
    """Delete a folder, which is renamed first: an interruption leaves it whole, or only under the other name."""
    if folder.exists():
        shutil.rmtree(by_way_of, ignore_errors=True)
        folder.rename(by_way_of)
        shutil.rmtree(by_way_of)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of a value as JSON, in hex; what has no JSON counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def dump_checksummed(content: dict[str, Any]) -> str:
    """The content as JSON text with its own checksum in it."""
    return json.dumps({**content, CHECKSUM: _checksum(content)}, indent=2)


def load_checksummed(text: str) -> dict[str, Any]:
    """The content of a `dump_checksummed` text. Raises ValueError where it is not what was written."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop(CHECKSUM, None) != _checksum(content):
        raise ValueError("it is not what was written")
    return content


def _checksum(content: dict[str, Any]) -> str:
    # As read back: a tuple has become a list, and a number a key.
    return digest_of(json.loads(json.dumps(content)))
