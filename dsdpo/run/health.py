"""What a node has that a run needs, looked at without a model: one finding a fact, with what to do about bad ones."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

from dsdpo.accelerator import unusable_gpu
from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import ModelConfig, RunConfig
from dsdpo.data.tokenize import cache_folder
from dsdpo.engine.quirks.compiled_ops import extensions_folder, stale_locks, unbuildable
from dsdpo.engine.zero_config import needed_ops
from dsdpo.host_memory import machine_memory
from dsdpo.run.agreement import driver_version, installed, nccl_version
from dsdpo.run.plan import nearest_existing, store_folder
from dsdpo.training.wandb_mirror import logged_in

GIB = 2**30
LITTLE_GIB = 5.0  # free on a disk, below which it is said
PROBE_BYTES = 32 << 20  # written to a disk to see how fast it is
FILES, SHM_GIB = 4096, 1.0  # open files and shared memory, below which it is said
CHECKPOINT_PER_WEIGHT = 7  # bytes of a checkpoint per byte of 16-bit weights: float32 weights and two moments beside
Level = Literal["red", "yellow", "ok"]  # red: would stop the run


@dataclass(frozen=True)
class Finding:
    """One fact about a node, or about all."""

    level: Level
    what: str
    value: str
    remedy: str = ""
    where: str = ""  # hosts; empty: all


def node_findings(run: RunConfig | None, configs: Sequence[dict[str, Any]]) -> list[Finding]:
    """Everything that one process can find out about its node; `configs` are the run's resolved DeepSpeed configs."""
    found = [*_versions(), *_devices(), *_memory(), *_limits(), *_compiler(configs), *_disks(run)]
    return [*found, *_models(run), *_wandb(run)]


def _versions() -> Iterator[Finding]:
    packages = ", ".join(
        f"{name} {installed(name)}" for name in ("dsdpo", "torch", "deepspeed", "transformers", "peft")
    )
    yield Finding("ok", "versions", packages)
    if torch.cuda.is_available():
        yield Finding("ok", "CUDA", f"{torch.version.cuda}, driver {driver_version()}, NCCL {nccl_version()}")


def _devices() -> Iterator[Finding]:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        if (reason := unusable_gpu()) is not None:
            yield Finding("red", "devices", reason)
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        yield Finding("ok", "devices", f"none but {cores} CPU cores, for {local} rank{'s' * (local > 1)}")
        return
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    yield Finding("ok", "devices", f"{count} of {names}, for {local} rank{'s' * (local > 1)}")
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        level: Level = "ok" if free > 0.9 * total else "yellow"
        remedy = "" if level == "ok" else "another process uses it: see nvidia-smi"
        yield Finding(level, f"memory of device {index}", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", remedy)


def _memory() -> Iterator[Finding]:
    if (found := machine_memory()) is None:
        return
    free, total = (size / GIB for size in found)
    level: Level = "ok" if free > 0.1 * total else "yellow"
    yield Finding(level, "host memory", f"{free:.1f} of {total:.1f} GiB free", "" if level == "ok" else "see top")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < FILES
    yield Finding("yellow" if few else "ok", "open files", f"{soft} at most", f"ulimit -n {hard}" if few else "")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if torch.cuda.is_available() and locked != resource.RLIM_INFINITY:
        yield Finding(
            "yellow", "locked memory", f"{locked / GIB:.3f} GiB at most", "InfiniBand needs ulimit -l unlimited"
        )
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total / GIB if shm.is_dir() else 0.0
    small = size < SHM_GIB
    remedy = "NCCL needs more within a node: docker run --shm-size 8g, or --ipc host" if small else ""
    yield Finding("yellow" if small else "ok", "shared memory", f"{size:.2f} GiB in /dev/shm", remedy)


def _compiler(configs: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    wanted = set[str]().union(*map(needed_ops, configs))
    for name in sorted(wanted):
        problem = unbuildable(name)
        yield Finding("red" if problem else "ok", f"operator {name}", problem or "this machine can build it")
    if not wanted:
        found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
        remedy = "" if found else "install g++: DeepSpeed compiles the operators that offloading needs"
        yield Finding("ok" if found else "yellow", "compiler", found or "none", remedy)
    for lock in stale_locks():
        yield Finding("yellow", "stale lock", str(lock), "left by a killed build; the next start removes it")


def folders(run: RunConfig | None) -> dict[str, Path]:
    """What a run writes to, by the name that a finding gives it."""
    found = {"HF_HUB_CACHE": Path(HF_HUB_CACHE), "TORCH_EXTENSIONS_DIR": extensions_folder()}
    if run is not None:
        found |= {"output_dir": Path(run.output_dir), "data.cache_dir": cache_folder(run.data)}
        found |= {"reference.store": store_folder(run)} if plan_reference(run).before_training else {}
    return found


def _disks(run: RunConfig | None) -> Iterator[Finding]:
    needed = checkpoint_bytes(run.model) * (run.checkpoint.keep_last + 1) if run and run.checkpoint.every_steps else 0
    for name, folder in folders(run).items():
        existing = nearest_existing(folder)
        free = shutil.disk_usage(existing).free
        try:
            speed = write_speed(existing)
        except OSError as error:
            needs = name != "HF_HUB_CACHE"  # which is only read where models are there
            remedy = "give a folder that can be written, or make room"
            value = f"{existing} cannot be written ({error.strerror})"
            yield Finding("red" if needs else "yellow", f"disk of {name}", value, remedy)
            continue
        level: Level = "ok"
        remedy = ""
        if name == "output_dir" and free < needed:
            level = "yellow"
            remedy = f"checkpoint.keep_last + 1 checkpoints take about {needed / GIB:.0f} GiB"
        elif free < LITTLE_GIB * GIB:
            level, remedy = "yellow", "make room"
        text = f"{existing}: {free / GIB:.1f} GiB free, writes {speed / 2**20:.0f} MiB/s"
        yield Finding(level, f"disk of {name}", text, remedy)


def write_speed(folder: Path) -> float:
    """Bytes per second that a disk takes, flushed. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        content = os.urandom(1 << 20)
        began = time.perf_counter()
        for _ in range(PROBE_BYTES >> 20):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - began)


def checkpoint_bytes(model: ModelConfig) -> int:
    """About the size of one checkpoint of a local model whose weights are stored in 16 bits; 0 for others."""
    files = Path(model.path).glob("*.safetensors") if model.lora is None else ()
    return CHECKPOINT_PER_WEIGHT * sum(path.stat().st_size for path in files)


def _models(run: RunConfig | None) -> Iterator[Finding]:
    if run is None:
        return
    for key, path, revision in (
        ("model.path", run.model.path, run.model.revision),
        ("reference.path", run.reference.path, run.reference.revision),
    ):
        if path is None or Path(path).exists() or path.startswith((".", "/", "~")):
            continue  # no Hub id; whether the folder is a model is said of the run
        try:
            cached = isinstance(huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision), str)
        except ValueError:
            cached = False
        if cached:
            yield Finding("ok", key, f"{path} is in the cache of this node")
        elif is_offline_mode():
            yield Finding("red", key, f"{path} is not in {HF_HUB_CACHE}", "HF_HUB_OFFLINE is set: download it first")
        else:
            yield Finding("yellow", key, f"{path} is not in {HF_HUB_CACHE}", "it is downloaded at the start")


def _wandb(run: RunConfig | None) -> Iterator[Finding]:
    if run is None or run.tracking.wandb is None:
        return
    mode = run.tracking.wandb.mode or os.environ.get("WANDB_MODE") or "online"
    if mode != "online":
        yield Finding("ok", "W&B", mode)
    elif logged_in():
        yield Finding("ok", "W&B", "logged in")
    else:
        yield Finding("yellow", "W&B", "not logged in", "wandb login; without it files are written to send later")
