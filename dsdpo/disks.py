"""Which ranks see a folder on one and the same disk: found with a file that each node leaves there for a moment."""

from __future__ import annotations

import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from dsdpo.distributed import all_or_none, by_host, gather_objects, local_rank, rank, world_size
from dsdpo.errors import ConfigError


@dataclass(frozen=True)
class Disk:
    """The disk that a folder is on for this rank, among those that it is on for all."""

    sharers: tuple[tuple[int, ...], ...] = ((0,),)  # ranks of each disk, ascending; rank 0's disk first

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that see this rank's disk."""
        return next(ranks for ranks in self.sharers if rank() in ranks)

    @property
    def leads(self) -> bool:
        """True on the one rank of each disk that makes, names and deletes what all of its ranks write into."""
        return self.members[0] == rank()

    @property
    def shared(self) -> bool:
        """True if all ranks see the same files."""
        return len(self.sharers) == 1

    def describe(self) -> str:
        """Whose disks there are, in words."""
        return "; ".join(by_host(ranks) for ranks in self.sharers)


def find_disk(folder: Path, *, key: str) -> Disk:
    """Who shares the disk of `folder` with whom; a rank that has no such folder is alone. Collective.

    Looks for files by names that nobody has asked for before, which no network file system answers from memory. Raises
    `ConfigError` naming the setting `key` and the host where nothing can be written.
    """
    if world_size() == 1:
        return Disk()
    token: Path | None = None
    try:
        with all_or_none():
            if local_rank() == 0 and folder.is_dir():
                token = folder / f".seen-{uuid.uuid4().hex}"
                try:
                    token.touch()
                except OSError as error:
                    raise ConfigError(
                        f"{key}: {folder} on {socket.gethostname()} cannot be written ({error.strerror}): make room, "
                        "or choose another folder"
                    ) from error
        names = gather_objects(None if token is None else token.name)
        leader = next((of for of, name in enumerate(names) if name and (folder / name).exists()), rank())
        leaders = gather_objects(leader)
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    return Disk(tuple(tuple(r for r, of in enumerate(leaders) if of == one) for one in sorted(set(leaders))))
