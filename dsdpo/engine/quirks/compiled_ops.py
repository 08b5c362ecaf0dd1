"""Builds DeepSpeed's compiled operators once per node, and removes the locks of builds that were killed.

DeepSpeed compiles an operator at first use, behind a lock file that a killed build leaves behind; every later start
then hangs without a message. Here one process of a node builds, says so, and tells a stale lock from a held one.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from dsdpo.distributed import all_or_none, barrier, local_rank
from dsdpo.engine.zero_config import needed_ops
from dsdpo.errors import ConfigError

BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "cpu_lion": "CPULionBuilder",
    "cpu_adagrad": "CPUAdagradBuilder",
    "fused_adam": "FusedAdamBuilder",
    "fused_lion": "FusedLionBuilder",
    "fused_lamb": "FusedLambBuilder",
    "async_io": "AsyncIOBuilder",
}
REMEDY = {"async_io": "install libaio's headers (Debian, Ubuntu: apt-get install libaio-dev)"}


def prepare_ops(*configs: dict[str, Any]) -> None:
    """Compile, once per node, the operators that these DeepSpeed configs need. Collective."""
    for name in sorted(set().union(*map(needed_ops, configs))):
        with all_or_none():
            if local_rank() == 0:
                _build(name)
        barrier()
        with all_or_none():
            if local_rank() != 0:
                _load(name)


def skip_shared_memory_op() -> None:
    """Keep `init_distributed` from compiling the CPU shared-memory collectives, 30 to 50 s at the first start.

    DeepSpeed 0.19 uses them in `inference_all_reduce` only, which training never calls.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _build(name: str) -> None:
    folder = build_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    # The kernel releases a flock when its holder dies, so none of our own processes waits for a dead one.
    with (folder.parent / f"{name}.dsdpo-lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        remove_stale_lock(folder)
        _check_buildable(name)
        started = time.monotonic()
        fresh = not any(folder.glob("*.so"))
        if fresh:
            print(f"compiling DeepSpeed's {name} into {folder} (once, about a minute) ...", flush=True)
        _load(name)
        if fresh:
            print(f"compiled {name} in {time.monotonic() - started:.0f} s", flush=True)


def _load(name: str) -> None:
    # torch looks for ninja on PATH, where a virtual environment that was not activated is missing.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]
    _check_buildable(name).load(verbose=False)


def _check_buildable(name: str) -> Any:
    """DeepSpeed's builder of an operator. Raises `ConfigError` where this machine lacks what the build needs."""
    builder = get_accelerator().create_op_builder(BUILDERS[name])
    with _stderr_closed():
        buildable = builder is not None and builder.is_compatible(verbose=False)
    if not buildable:
        raise ConfigError(
            f"DeepSpeed's {name} operator cannot be built on this machine: "
            f"{REMEDY.get(name, 'install a C++ compiler (g++)')}, or choose a DeepSpeed JSON without what needs it"
        )
    return builder


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """A block whose compilers and linkers write nothing to standard error (descriptor 2).

    DeepSpeed tries libraries by linking a test program, and silences the linker only where sys.stderr is descriptor 2.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def extensions_folder() -> Path:
    """Where torch builds operators: TORCH_EXTENSIONS_DIR when that is set."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def build_folder(name: str) -> Path:
    """Where torch builds the operator."""
    return extensions_folder() / name


def unbuildable(name: str) -> str | None:
    """Why an operator cannot be compiled on this machine, None if it can."""
    try:
        _check_buildable(name)
    except ConfigError as error:
        return str(error)
    return None


def stale_locks() -> list[Path]:
    """The locks of builds that nobody is at work on."""
    return [lock for lock in extensions_folder().glob("*/lock") if not _processes_in(lock.parent)]


def remove_stale_lock(folder: Path, *, patience_s: float = 3.0) -> bool:
    """True if a lock that a killed build left in `folder` was found, named on the screen and removed.

    A build in progress runs its compilers with `folder` as their working directory; a lock that stands for
    `patience_s` without any such process has no owner.
    """
    lock = folder / "lock"
    announced = False
    idle_since = time.monotonic()
    while lock.exists():
        if builders := _processes_in(folder):
            idle_since = time.monotonic()
            if not announced:
                print(f"waiting for another process that is compiling in {folder} (pid {builders[0]})", flush=True)
                announced = True
        elif time.monotonic() - idle_since > patience_s:
            print(f"removing the lock of a build that was killed: {lock}", flush=True)
            lock.unlink(missing_ok=True)
            return True
        time.sleep(0.2)
    return False


def _processes_in(folder: Path) -> list[int]:
    here = folder.resolve()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve(strict=True) == here:
                found.append(int(process.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found
