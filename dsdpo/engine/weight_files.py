"""What a model folder's weight files hold, read from their headers alone: names, shapes, and whether they are whole."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dsdpo.errors import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LARGEST_HEADER = 100 * 2**20  # bytes; what the format allows
ROWS = 4096  # of an embedding that are compared at a time
LFS = b"version https://git-lfs"
TRAINED_AS = ("F64", "F32", "F16", "BF16")  # safetensors' names of dtypes
Shapes = dict[str, tuple[int, ...]]


def model_tensors(folder: Path, *, key: str, allow_pickle: bool) -> Shapes:
    """Name and shape of every tensor of the model in `folder`.

    Raises `ConfigError`, which names the setting `key`, where a file is missing, cut off or no weights at all.
    """
    if (folder / WEIGHTS).is_file():
        return safetensors_shapes(folder / WEIGHTS, key=key)
    if (folder / INDEX).is_file():
        return _sharded(folder, INDEX, key=key)
    if allow_pickle and (folder / PICKLE).is_file():
        return _pickled(folder / PICKLE, key=key)
    if allow_pickle and (folder / PICKLE_INDEX).is_file():
        return _sharded(folder, PICKLE_INDEX, key=key)
    raise ConfigError(f"{key}: {folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a whole model")


def _sharded(folder: Path, index: str, *, key: str) -> Shapes:
    """The tensors of all files that an index names."""
    try:
        places: dict[str, str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if not all(isinstance(name, str) for name in files):
            raise TypeError(f"weight_map puts tensors into {files[0]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{key}: {folder / index} is not an index of weights ({why}); {AGAIN}") from error
    shapes: Shapes = {}
    for name in files:
        if not (folder / name).is_file():
            raise ConfigError(f"{key}: {folder / name} is missing, which {index} names; {AGAIN}")
        read = safetensors_shapes if name.endswith(".safetensors") else _pickled
        held = read(folder / name, key=key)
        absent = [tensor for tensor, file in places.items() if file == name and tensor not in held]
        if absent:
            raise ConfigError(
                f"{key}: {folder / index} says that {name} holds {some(absent)}, but it does not; {AGAIN}"
            )
        shapes |= held
    return shapes


def first_difference(folder: Path, pairs: Mapping[str, str]) -> tuple[str, str] | None:
    """The first two tensors of `pairs` that are both stored and hold other values; None if there are none.

    Of pickles nothing is known.
    """
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        holders = {name: file for file in reversed(opened) for name in file.keys()}  # noqa: SIM118 - not a dict
        for one, other in pairs.items():
            both = [holders[name].get_slice(name) for name in (one, other) if name in holders]
            if len(both) == 2 and not _equal(*both):
                return one, other
    return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same values, some rows in memory at a time."""
    if one.get_shape() != other.get_shape():
        return False
    rows = range(0, one.get_shape()[0], ROWS)
    return all(torch.equal(one[row : row + ROWS].float(), other[row : row + ROWS].float()) for row in rows)


AGAIN = "copy or download the model again"


def safetensors_shapes(path: Path, *, key: str) -> Shapes:
    """Name and shape of every tensor of a safetensors file, which is found to be whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS))
        if start == LFS:
            raise ConfigError(f"{key}: {path} is a git-lfs pointer, not the weights themselves; run git lfs pull")
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ConfigError(f"{key}: {path} ({size:,} bytes) is no safetensors file, or is cut off; {AGAIN}")
        file.seek(8)
        header = file.read(length)
    try:
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        shapes = {name: tuple(int(n) for n in tensor["shape"]) for name, tensor in tensors.items()}
        end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ConfigError(f"{key}: {path} is no safetensors file; {AGAIN}") from error
    if size != end:
        what = "is cut off" if size < end else "is not what its header says"
        raise ConfigError(f"{key}: {path} {what}: it has {size:,} bytes of {end:,}; {AGAIN}")
    # Masks and indices may be whole numbers.
    kinds = {name: str(tensor.get("dtype")) for name, tensor in tensors.items() if name.endswith("weight")}
    other = sorted(f"{name} ({kind})" for name, kind in kinds.items() if kind not in TRAINED_AS)
    if other:
        raise ConfigError(
            f"{key}: {path} stores {some(other)}: quantized weights, which dsdpo does not train; give the model that "
            "they were made from, with weights in 16 or 32 bits"
        )
    return shapes


def _pickled(path: Path, *, key: str) -> Shapes:
    try:
        content: Mapping[str, Any] = torch.load(path, map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{key}: {path} cannot be read as weights ({first_line[:200]}); {AGAIN}") from error


def some(names: list[str], *, most: int = 4) -> str:
    """The first of some names, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
