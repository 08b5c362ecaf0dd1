"""The policy's weights out of a checkpoint's files, without an engine: any ZeRO stage, any number of ranks that saved.

The float32 weights of the optimizer are what was trained; the 16-bit ones that a live engine computes with are these,
rounded. They are read by stretches from the partitions of all ranks.
"""

from __future__ import annotations

import ctypes
import mmap
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdpo.console import counted
from dsdpo.engine.quirks.checkpoint_files import TAG
from dsdpo.engine.quirks.repartition import lies_elsewhere
from dsdpo.engine.quirks.saved_partitions import MASTER, Saved, read_checkpoint
from dsdpo.errors import CheckpointError

PREFIX = "lm."  # of a `ResponseScorer`'s parameters


class CheckpointWeights:
    """The trained parameters and saved buffers of a checkpoint, by their names in the language model."""

    def __init__(self, path: Path) -> None:
        """`path`: a whole checkpoint of ours, found to be what was written: its files are pickles.

        Raises `CheckpointError` where the weights are not in the files.
        """
        self._saved: Saved = read_checkpoint(path / TAG)
        config = self._saved.model["ds_config"]
        if reason := lies_elsewhere(config):
            raise CheckpointError(
                f"{path}: its weights cannot be taken out: {reason}; finish the run with --resume auto, which exports "
                "them"
            )
        groups: list[dict[str, torch.Size]] = self._saved.model["param_shapes"]
        self.shapes = {name.removeprefix(PREFIX): tuple(shape) for group in groups for name, shape in group.items()}
        self.buffers: dict[str, Tensor] = {
            name.removeprefix(PREFIX): self._saved.model["module"][name]
            for name in self._saved.model["buffer_names"]
            if name in self._saved.model["module"]
        }

    def check_fills(self, shapes: dict[str, tuple[int, ...]], *, path: Path) -> None:
        """Raise `CheckpointError` unless the trained parameters are these, by name and shape."""
        odd = sorted(shapes.keys() ^ self.shapes.keys())
        odd += sorted(name for name in shapes.keys() & self.shapes.keys() if shapes[name] != self.shapes[name])
        if odd:
            raise CheckpointError(
                f"{path} is not of the model that its run names: {counted(len(odd), 'parameter')} are in one of them "
                f"only or of another shape, the first is {odd[0]}; put that model back"
            )

    def read(self, name: str, first: int, count: int) -> Tensor:
        """So many flat elements of a parameter from there on, float32."""
        target = torch.empty(count, dtype=torch.float32)
        missing = count
        for rank, part in self._saved.stretches[PREFIX + name]:
            start, end = max(first, part.start), min(first + count, part.start + part.count)
            if start < end:
                place = part.offset + start - part.start
                source = self._saved.values[rank][part.flat][MASTER].view(-1)[place : place + end - start]
                target[start - first : end - first].copy_(source)
                give_back(source)
                missing -= end - start
        if missing:
            raise CheckpointError(f"{missing} elements of {name} are missing in the checkpoint's files")
        return target

    def whole(self, name: str) -> Tensor:
        """A parameter in its shape, float32."""
        shape = self.shapes[name]
        return self.read(name, 0, prod(shape)).view(shape)


def give_back(mapped: Tensor) -> None:
    """Let the system take back the memory of a mapped file's pages that have been read: they would count as ours."""
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
        return  # not Linux: pages go when memory is short
    page = mmap.PAGESIZE
    start = mapped.data_ptr() // page * page
    end = -(-(mapped.data_ptr() + mapped.nbytes) // page) * page
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED))
