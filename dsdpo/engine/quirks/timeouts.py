"""One time limit for the collectives of every process group.

DeepSpeed 0.19 makes groups of its own for ZeRO (`groups._clone_world_group`) without passing on the limit that
`init_distributed` was given: they get torch's default, 10 minutes under NCCL and 30 under gloo. torch keeps that
default in two names of `torch.distributed.distributed_c10d`, which `new_group` reads at each call.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def set_default_timeout(timeout: timedelta) -> None:
    """Have each process group that is made without a limit of its own get this one."""
    distributed_c10d.default_pg_timeout = timeout  # type: ignore[misc]
    if isinstance(getattr(distributed_c10d, "default_pg_nccl_timeout", None), timedelta):
        distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[misc]
