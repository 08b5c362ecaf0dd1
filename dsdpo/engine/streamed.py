"""Safetensors files written piece by piece, so that a model of any size passes through a small, stated memory.

The format (github.com/huggingface/safetensors) begins with the length of its header, 8 bytes, and the header, JSON that
says where each tensor's bytes lie: all of it is known before the first weight is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdpo.atomic import write_json
from dsdpo.engine.weight_files import INDEX, WEIGHTS

MEMORY_BYTES = 256 * 2**20  # that a model on its way may take up, by default
SHARD_BYTES = 5 * 10**9  # of one file
COPIES = 4  # of a piece that are alive at once: as read, in float32, what is added to it, and as written
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Streamed:
    """A tensor that is read as it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # that it is written in
    read: Callable[[int, int], Tensor]  # (first, count) -> so many flat elements from there on, of any dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_streamed(
    folder: Path, tensors: Sequence[Streamed], *, memory_bytes: int = MEMORY_BYTES, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write the tensors to `folder` as Hugging Face names them, in one file or several with an index; the files.

    A file holds at most `shard_bytes`, or one larger tensor. No more than `memory_bytes` is held at a time. Raises
    OSError.
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        files = [folder / WEIGHTS]
    else:
        files = [
            folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
    for path, shard in zip(files, shards, strict=True):
        _write_file(path, shard, memory_bytes)
    if len(shards) > 1:
        places = {tensor.name: path.name for path, shard in zip(files, shards, strict=True) for tensor in shard}
        sizes = {
            "total_parameters": sum(prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.size for tensor in tensors),
        }
        write_json(folder / INDEX, {"metadata": sizes, "weight_map": dict(sorted(places.items()))})
    return files


def _shards(tensors: Sequence[Streamed], shard_bytes: int) -> Iterator[list[Streamed]]:
    shard: list[Streamed] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size
    yield shard


def _write_file(path: Path, tensors: Sequence[Streamed], memory_bytes: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.size],
        }  # fmt: skip
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that weights begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            left = prod(tensor.shape)
            for first, count in pieces(left, memory_bytes):
                piece = tensor.read(first, count).to(tensor.dtype).contiguous()
                assert piece.numel() == count, tensor.name
                file.write(piece.view(torch.uint8).numpy().data)
                del piece  # not beside the next one
        file.flush()


def pieces(elements: int, memory_bytes: int) -> Iterator[tuple[int, int]]:
    """First element and count of stretches whose copies in float32 fit `memory_bytes`."""
    most = max(1, memory_bytes // (4 * COPIES))
    for first in range(0, elements, most):
        yield first, min(most, elements - first)


class WeightFiles:
    """The tensors of safetensors files, read by stretches without mapping a file into memory."""

    def __init__(self, *files: Path) -> None:
        """Of these files. Raises OSError or ValueError where they are none: see `weight_files` for who explains why."""
        self._places: dict[str, tuple[Path, int, str, tuple[int, ...]]] = {}
        for path in files:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    start = 8 + length + int(entry["data_offsets"][0])
                    self._places[tensor] = path, start, entry["dtype"], tuple(entry["shape"])

    @classmethod
    def of(cls, folder: Path) -> WeightFiles:
        """Of a model folder."""
        if (folder / WEIGHTS).is_file():
            return cls(folder / WEIGHTS)
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return cls(*(folder / name for name in sorted(set(places.values()))))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._places[name][3]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return DTYPES[self._places[name][2]]

    def read(self, name: str, first: int, count: int) -> Tensor:
        """So many flat elements from there on."""
        path, start, kind, _ = self._places[name]
        dtype = DTYPES[kind]
        found = bytearray(count * dtype.itemsize)
        with path.open("rb", buffering=0) as file:
            file.seek(start + first * dtype.itemsize)
            view = memoryview(found)
            while len(view):
                got = file.readinto(view)
                if not got:
                    raise OSError(f"{path} is cut off")
                view = view[got:]
        return torch.frombuffer(found, dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape."""
        shape = self.shape(name)
        return self.read(name, 0, prod(shape)).view(shape)
