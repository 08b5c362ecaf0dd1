"""Whether a run's checkpoints are written in the background, which takes host memory for copies of their state."""

from __future__ import annotations

import math
import socket

from dsdpo.console import say
from dsdpo.distributed import gather_objects, rank, world_size
from dsdpo.engine.load import DTYPES
from dsdpo.engine.quirks.put_off import HostCopies
from dsdpo.engine.types import TrainingEngine
from dsdpo.engine.zero_config import offload_device
from dsdpo.errors import ConfigError
from dsdpo.estimate.checkpoint_size import checkpoint_size
from dsdpo.host_memory import free_memory
from dsdpo.run.estimate_report import size
from dsdpo.run.output_folder import parameter_counts
from dsdpo.run.plan import Plan

SHARE = 0.5  # of a host's free memory that `auto` takes at most
PINNED = 2.0  # torch rounds pinned memory up to powers of two: a copy of what is on a device may take as much more


def host_copies(plan: Plan, policy: TrainingEngine) -> HostCopies | None:
    """What checkpoints are copied into; None: they are written while training waits. Collective, and says which.

    Raises `ConfigError` where `checkpoint.background` is true and a host has less memory than the copies take.
    """
    settings = plan.run.checkpoint
    if settings.background is False or not 0 < settings.every_steps < plan.total_steps:
        return None  # the last checkpoint is written at once anyway
    if offload_device(plan.policy_config, "optimizer") == "nvme":
        say("checkpoints are written while training waits: optimizer states on NVMe are copied from disk to disk")
        return None
    mine = socket.gethostname(), copied_bytes(plan, policy), free_memory()
    needed: dict[str, float] = {}
    free: dict[str, float] = {}
    for host, bytes_of_rank, left in gather_objects(mine):
        needed[host] = needed.get(host, 0.0) + bytes_of_rank
        free[host] = min(free.get(host, math.inf), math.inf if left is None else left)
    tight = max(needed, key=lambda host: needed[host] / max(1.0, free[host]))
    has = f", which has {size(free[tight])} free" if math.isfinite(free[tight]) else ""
    takes = f"{size(needed[tight])} of host memory on {tight}{has}"
    if settings.background is True:
        if needed[tight] > free[tight]:
            raise ConfigError(
                f"checkpoint.background: true, but copies of the state to save would take {takes}: set it to auto or "
                "false, and training waits for saves"
            )
    elif needed[tight] > SHARE * free[tight]:
        say(
            f"checkpoints are written while training waits: copies of their state would take {takes}; "
            f"checkpoint.background auto takes {SHARE:.0%} of it at most"
        )
        return None
    say(f"checkpoints are written in the background: copies of their state take {takes}")
    return HostCopies()


def copied_bytes(plan: Plan, policy: TrainingEngine) -> float:
    """Host memory that the copies of this rank take at most."""
    whole, trained = parameter_counts(policy)
    itemsize = DTYPES[plan.run.model.dtype].itemsize
    configs = plan.policy_config, plan.reference_config
    found = checkpoint_size(*configs, plan.reference, trained=trained, whole=whole, itemsize=itemsize)
    on_device = next(policy.module.parameters()).device.type != "cpu"
    return found.of_rank(rank(), world_size()) * (PINNED if on_device else 1.0)
