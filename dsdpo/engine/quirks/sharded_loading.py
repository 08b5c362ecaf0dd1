"""Fill a model under ZeRO-3 by parts: each rank reads its own, where transformers has rank 0 read and broadcast all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils

from dsdpo.console import tell_amount
from dsdpo.distributed import all_or_none, gather_objects, rank
from dsdpo.engine.shards import full_numel, full_shape, is_on_nvme, is_partitioned, own_elements, writable_shard
from dsdpo.engine.streamed import DTYPES, MEMORY_BYTES, WeightFiles, pieces


@contextmanager
def loading_own_shards(*, like: nn.Module | None = None) -> Iterator[None]:
    """A block in which `from_pretrained` under ZeRO-3 fills each rank's part of the model from the rank's own reading.

    transformers 5 gathers one module after the other, has rank 0 copy the stored weights into it and broadcasts them.
    Here nothing is gathered or sent: a rank reads the stretches of the safetensors files that are its own, no more than
    `MEMORY_BYTES` at a time. With `like`, a model that holds these very weights, parts that are cut as its own are
    copied from it instead. What is renamed or merged on the way (most mixtures of experts), pickled, of a type that
    torch does not compute in, or kept on NVMe is left to transformers.
    """
    load, fill = modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model
    paths: list[str] = []

    def shapes_only(checkpoint_file: Any, map_location: Any = "cpu", **options: Any) -> dict[str, torch.Tensor]:
        paths.append(str(checkpoint_file))
        return dict(load(checkpoint_file, map_location="meta", **options))

    def fill_own(
        model: Any, state_dict: dict[str, torch.Tensor], load_config: Any = None
    ) -> tuple[list[str], set[str]]:
        names = _stored_names(model, state_dict, paths)
        by_parts = all(gather_objects(names is not None))  # a node may have other files than the others
        if names is None or not by_parts:
            whole: dict[str, torch.Tensor] = {}
            for path in paths:
                weights_only = load_config is None or load_config.weights_only
                whole |= load(path, map_location="cpu" if rank() == 0 else "meta", weights_only=weights_only)
            answer: tuple[list[str], set[str]] = fill(model, whole, load_config)
            return answer
        with all_or_none():
            same = dict(like.named_parameters()) if like is not None else {}
            _fill(model, names, WeightFiles(*map(Path, paths)), same)
        if mapping := getattr(load_config, "weight_mapping", None):
            model._weight_conversions = mapping  # as transformers does, for saving
        return [], set(model.state_dict()) - set(names)

    modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model = shapes_only, fill_own
    try:
        yield
    finally:
        modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model = load, fill


def _stored_names(model: nn.Module, stored: dict[str, torch.Tensor], paths: list[str]) -> dict[str, str] | None:
    """By the name of each stored parameter and buffer, the stored name; None if something is stored otherwise."""
    targets = _tensors(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for name, tensor in stored.items():
        target = prefix + name if prefix + name in targets else name
        if target not in targets or full_shape(targets[target]) != tuple(tensor.shape) or is_on_nvme(targets[target]):
            return None
        if tensor.dtype not in DTYPES.values():
            return None
        names[target] = name
    return names if all(path.endswith(".safetensors") for path in paths) else None


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by all their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _fill(model: nn.Module, names: dict[str, str], files: WeightFiles, same: dict[str, Any]) -> None:
    """Write the stored values, or those of `same`, to this rank's part of each parameter and to whole buffers."""
    targets = _tensors(model)
    total = sum(full_numel(targets[name]) * files.dtype(stored).itemsize for name, stored in names.items())
    done, started = 0, time.monotonic()
    for name, stored in names.items():
        target = targets[name]
        with torch.no_grad(), writable_shard(target) as (own, start):
            if _cut_alike(same.get(name), target):
                own.copy_(own_elements(same[name])[0])
            else:
                for first, count in pieces(own.numel(), MEMORY_BYTES):
                    own[first : first + count].copy_(files.read(stored, start + first, count))
        target._is_hf_initialized = True  # which keeps transformers from drawing it at random
        done += full_numel(target) * files.dtype(stored).itemsize
        tell_amount(done, total, seconds=time.monotonic() - started)


def _cut_alike(source: Any, target: Any) -> bool:
    """Whether a rank's part of both parameters is the same stretch, stored in the same type."""
    return (
        is_partitioned(source)
        and is_partitioned(target)
        and not is_on_nvme(source)
        and source.ds_tensor.dtype == target.ds_tensor.dtype
        and own_elements(source)[0].numel() == own_elements(target)[0].numel()
        and own_elements(source)[1] == own_elements(target)[1]
    )
