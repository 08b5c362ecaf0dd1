"""How much host memory is free for this process: on its machine, and in the control group that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMINFO, GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def machine_memory() -> tuple[int, int] | None:
    """Bytes that are free on the machine, and all that it has; None where the system does not say so, as on macOS."""
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free, total = (1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
        return free, total
    return None


def free_memory() -> int | None:
    """Bytes that this process and others in its control group can still take; None where that is not known."""
    machine = machine_memory()
    found = [*group_memory(GROUP, GROUPS), *([machine[0]] if machine else [])]
    return min(found, default=None)


def group_memory(group: Path, root: Path) -> Iterator[int]:
    """Bytes that are left in each control group that holds a process, whose file in /proc `group` is.

    Pages of files count as used there, although they make way: those not used lately are counted as free.
    """
    with suppress(OSError):
        for line in group.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            top = root / kinds
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
            folder = top / path.lstrip("/")
            while folder.is_relative_to(top):
                yield from _left_in(folder, *names)
                folder = folder.parent


def _left_in(folder: Path, limit_name: str, usage_name: str) -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):  # no limit is the word "max" there
        limit, used = (int((folder / name).read_text()) for name in (limit_name, usage_name))
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(lines.get("total_inactive_file", lines.get("inactive_file", "0")))
        yield max(0, limit - used + cached)
