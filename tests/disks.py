"""A small disk that can be filled up."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, kib: int) -> Iterator[Path]:
    """A file system of `kib` KiB at `folder`; skips the test where none can be mounted, as without root."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, *, leaving_kib: int) -> None:
    """Put a file on the disk that leaves so much room."""
    (disk / "filler").write_bytes(b"\1" * max(0, shutil.disk_usage(disk).free - 1024 * leaving_kib))


def empty(disk: Path) -> None:
    """Take it away again."""
    (disk / "filler").unlink(missing_ok=True)
