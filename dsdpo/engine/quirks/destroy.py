"""Destroy an inference engine and free its memory, which DeepSpeed's module-level caches would keep."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from dsdpo.engine.shards import is_partitioned


def destroy_engine(engine: DeepSpeedEngine) -> None:
    """Take the engine's hooks off its module, empty every tensor of it and give the memory back. Collective under NVMe.

    `engine.destroy()` alone leaves two hooks, and a module stack and a function cache of DeepSpeed 0.19 keep module and
    shards alive for ever. Parameters are emptied too, so that a caller's last reference to the engine costs nothing.
    """
    module = engine.module
    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if hook is not None:
            hook.remove()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    _clear_release_cache()
    for tensor in [*module.parameters(), *module.buffers()]:
        _empty(tensor)
        if is_partitioned(tensor):
            _empty(tensor.ds_tensor)
            tensor.ds_secondary_tensor = None
    del module, tensor
    give_back_memory()


def give_back_memory() -> None:
    """Collect garbage and hand unused memory back to the device and, with glibc, to the system."""
    gc.collect()
    get_accelerator().empty_cache()
    if sys.platform == "linux":
        # Freed blocks smaller than malloc's mmap threshold otherwise stay with the process.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def used_memory() -> dict[str, int]:
    """Bytes this process holds now: on the `host`, mapped files left out, and on the `device` where it has its own."""
    used = {}
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        used["host"] = int(lines["RssAnon"].split()[0]) * 1024
    if get_accelerator().device_name() != "cpu":
        used["device"] = int(get_accelerator().memory_allocated())
    return used


def _empty(tensor: Any) -> None:
    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _clear_release_cache() -> None:
    """Empty the `lru_cache` that holds modules as keys; it stands behind a wrapper that only has it in a closure."""
    wrapped: Any = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(wrapped, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
