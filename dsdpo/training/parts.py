"""A checkpoint whose files lie on several disks: what each has, and bringing a disk what its ranks will read.

Nodes without a common disk each keep the files of their own ranks, under the same name. Which files there are, and
their checksums, stand in every part's manifest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dsdpo.atomic import partial_path
from dsdpo.disks import Disk, find_disk
from dsdpo.distributed import all_or_none, gather_objects, rank
from dsdpo.engine.build import device
from dsdpo.errors import CheckpointError

PIECE = 1 << 26  # bytes that travel at once
OF_RANK = re.compile(r"rank[-_]?(\d+)")  # in the names of a rank's own files, DeepSpeed's and ours


def files_below(folder: Path) -> list[str]:
    """The files in a checkpoint's folder on this rank's disk, by their paths there, sorted.

    Without hidden ones: another rank may be writing them, as safetensors writes before it renames, or NFS deleting.
    """
    found = (path for path in folder.rglob("*") if not path.name.startswith(".") and path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def written_by(of_rank: int, folder: Path, disk: Disk) -> list[str]:
    """The files below a checkpoint's folder that a rank has written itself.

    Of a disk's files that no rank of it is in the name of, these are the leader's.
    """
    own = []
    for name in files_below(folder):
        found = OF_RANK.search(name)
        writer = int(found[1]) if found is not None and int(found[1]) in disk.members else disk.members[0]
        own += [name] if writer == of_rank else []
    return own


def read_by(of_rank: int, names: Sequence[str]) -> set[str]:
    """Of a checkpoint's files, those that a rank reads where ranks and partitions are what they were.

    These are its own, rank 0's and those of no rank.
    """
    own = {name: OF_RANK.search(name) for name in names}
    return {name for name, found in own.items() if found is None or int(found[1]) in (0, of_rank)}


def bring(path: Path, wanted: set[str]) -> bool:
    """Put the files of a checkpoint that this rank has `wanted` on its disk, from others that have them. Collective.

    False where all ranks share one disk. Raises `CheckpointError` where no disk has one of them, or a disk fails.
    """
    disk = find_disk(path.parent, key="output_dir")
    if disk.shared:
        return False
    every = gather_objects((set(files_below(path)) if disk.leads else set(), wanted))
    problem = ""
    for name, source, target in transfers(disk, every, path):
        if rank() == source:
            problem = problem or _send(path / name, target)
        elif rank() == target:
            problem = problem or _receive(path / name, source)
    with all_or_none():
        if problem:
            raise CheckpointError(problem)
    return True


def _send(path: Path, target: int) -> str:
    """Send a file to another rank; what went wrong, if anything. The other rank gets as many bytes as it awaits."""
    problem, place = "", device()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        dist.send(torch.tensor([size], device=place), target)
        for start in range(0, size, PIECE):
            piece = torch.zeros(min(PIECE, size - start), dtype=torch.uint8)
            try:
                file.readinto(piece.numpy().data)
            except OSError as error:
                problem = f"{path} cannot be read: {error.strerror}"
            dist.send(piece.to(place), target)
    return problem


def _receive(path: Path, source: int) -> str:
    """Write a file that another rank sends; what went wrong, if anything. All is taken, or both would hang."""
    size = torch.zeros(1, dtype=torch.int64, device=device())
    dist.recv(size, source)
    problem, partial = "", partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"")
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}"
    for start in range(0, int(size), PIECE):
        piece = torch.empty(min(PIECE, int(size) - start), dtype=torch.uint8, device=device())
        dist.recv(piece, source)
        try:
            if not problem:
                with partial.open("ab") as file:
                    file.write(piece.cpu().numpy().tobytes())
        except OSError as error:
            problem = f"{path} cannot be written: {error.strerror}"
    if problem:
        partial.unlink(missing_ok=True)
    else:
        partial.replace(path)
    return problem


def transfers(disk: Disk, every: Sequence[tuple[set[str], set[str]]], path: Path) -> list[tuple[str, int, int]]:
    """Which file travels from which rank to which, from what every rank's disk has and every rank wants."""
    found = []
    for ranks in disk.sharers:
        missing = set[str]().union(*(every[member][1] for member in ranks)) - every[ranks[0]][0]
        for name in sorted(missing):
            source = next((other[0] for other in disk.sharers if name in every[other[0]][0]), None)
            if source is None:
                raise CheckpointError(f"{path / name} is on the disk of no rank that is left")
            found.append((name, source, ranks[0]))
    return found
