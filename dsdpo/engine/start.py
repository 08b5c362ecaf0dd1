"""Joining the process group, whoever started this process."""

from __future__ import annotations

import logging
import os
import re
import socket
import zlib
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from dsdpo.accelerator import check_share
from dsdpo.console import Launched, counted, launched
from dsdpo.distributed import number_device
from dsdpo.engine.meeting import meet
from dsdpo.engine.quirks.compiled_ops import skip_shared_memory_op
from dsdpo.engine.quirks.timeouts import set_default_timeout
from dsdpo.errors import ConfigError, DsdpoError, TrainingError

JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PALS_APID", "SLURM_JOB_ID")  # the same for all its processes


def start_distributed(*, timeout_minutes: float) -> None:
    """Join the process group of whatever started this process: deepspeed, torchrun, srun, mpirun, or nobody.

    Collectives that take longer than `timeout_minutes` end the run instead of hanging it, in every process group made
    from here on. Raises `ConfigError` where the environment does not say who this process is, or where others meet.
    """
    if torch.distributed.is_initialized():
        return
    who = launched()
    adopt(who)
    _follow_log_level()
    skip_shared_memory_op()
    timeout = timedelta(minutes=timeout_minutes)
    set_default_timeout(timeout)
    devices = get_accelerator().device_count() if get_accelerator().device_name() != "cpu" else 0
    check_share(who.local_size, devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    index = who.local_rank % devices if devices else who.local_rank  # some launchers show each process its own only
    number_device(index)
    get_accelerator().set_device(index)
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one node would otherwise each take every core and fight over them.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // who.local_size))
    try:
        if who.world_size > 1:
            meet(who, limit_s=timeout.total_seconds())
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except torch.distributed.DistError as error:
        raise _explained(error, who, timeout_minutes) from error


def tell_others(mistake: DsdpoError, *, limit_s: float) -> bool:
    """Bring a mistake that this rank has found on its own to where ranks meet; whether all know of one then.

    False if rank 0 is not there within `limit_s`: it may have found the same mistake, said so and gone.
    """
    try:
        who = launched()
        adopt(who)
        meet(who, limit_s=limit_s, mistake=mistake)
    except (DsdpoError, torch.distributed.DistError) as error:
        return getattr(error, "agreed", False)
    return False


def adopt(who: Launched) -> None:
    """Set the variables that torch and DeepSpeed read: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT."""
    env = os.environ
    alone = who.by == "nobody"
    env.update(RANK=str(who.rank), WORLD_SIZE=str(who.world_size), LOCAL_RANK=str(who.local_rank))
    env.setdefault("LOCAL_WORLD_SIZE", str(who.local_size))  # torchrun's name
    env.setdefault("LOCAL_SIZE", str(who.local_size))  # deepspeed's
    if alone or (who.world_size == 1 and "MASTER_PORT" not in env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(free.getsockname()[1])
    address, port = env.get("MASTER_ADDR") or _meeting_host(who), env.get("MASTER_PORT") or _meeting_port()
    if not (address and port):
        raise ConfigError(
            f"{who.world_size} processes were started by {who.by}, but nothing says where they meet: set MASTER_ADDR "
            "to the first host and MASTER_PORT to a free port of it, for all of them (mpirun -x MASTER_ADDR=HOST -x "
            "MASTER_PORT=29500)"
        )
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"MASTER_PORT is {port!r} in the environment, but must be a port from 1 to 65535")
    env["MASTER_ADDR"], env["MASTER_PORT"] = address, port


def _meeting_host(who: Launched) -> str:
    """The host of rank 0, where that can be told without asking anyone."""
    if who.local_size == who.world_size:
        return "127.0.0.1"
    if who.by != "Slurm":
        return ""
    return first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", ""))


def first_host(names: str) -> str:
    """The first name of a Slurm node list: node-[03-05,9],gpu7 -> node-03."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", names)
    return "".join(part or "" for part in found.groups()) if found else ""


def _meeting_port() -> str:
    """A port that follows from the job's name, so that all its processes agree on it and two jobs seldom do."""
    job = next((os.environ[name] for name in JOB_NAMES if os.environ.get(name)), None)
    return "" if job is None else str(20_000 + zlib.crc32(job.encode()) % 20_000)


def _explained(error: Exception, who: Launched, minutes: float) -> Exception:
    """What a user can do about ranks that do not meet."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if re.search("EADDRINUSE|address already in use", str(error), re.IGNORECASE):
        return ConfigError(
            f"MASTER_PORT {os.environ['MASTER_PORT']} is taken by another program on this machine: give another "
            "(deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N)"
        )
    if re.search("duplicate gpu", str(error), re.IGNORECASE):
        return ConfigError(
            f"several of the {who.local_size} ranks of this node use one GPU, which NCCL does not allow: start as many "
            "ranks as there are GPUs, and show each its own (LOCAL_RANK, CUDA_VISIBLE_DEVICES)"
        )
    return TrainingError(
        f"the {counted(who.world_size, 'rank')} did not meet at {place} (MASTER_ADDR, MASTER_PORT) within "
        f"{minutes:g} minutes: "
        f"{said}. See that every process started (the launcher's first lines), and that the others reach that port"
    )


def _follow_log_level() -> None:
    """DeepSpeed's logger at the level of all others: it comes with its own, and its handler with another."""
    logger, level = logging.getLogger("DeepSpeed"), logging.getLogger().level
    logger.setLevel(level)
    for handler in logger.handlers:
        handler.setLevel(level)
