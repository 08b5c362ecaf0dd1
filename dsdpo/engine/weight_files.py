"""What a model folder's weight files hold, read from their headers alone: names, shapes, and whether they are whole."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsdpo.errors import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LARGEST_HEADER = 100 * 2**20  # bytes; what the format allows
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {folder / index} is not an index of weights ({error}); {AGAIN}") from error
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
    if size < end:
        raise ConfigError(f"{key}: {path} is cut off: it has {size:,} bytes of {end:,}; {AGAIN}")
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
