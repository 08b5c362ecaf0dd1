"""Fewer ranks than a run wants: torchrun's elastic agents are waited for, elsewhere the run is refused."""

from __future__ import annotations

import os
import sys
import time

from dsdpo.config.run import DistributedConfig
from dsdpo.console import Launched, counted, restarts_ranks
from dsdpo.errors import ConfigError, TrainingError
from dsdpo.stop_signals import noted_signal

LOOK_S = 0.5


def check_ranks(settings: DistributedConfig, who: Launched) -> int:
    """The number of ranks, if there are as many as `distributed.min_ranks`.

    Otherwise, where torchrun starts all ranks anew as soon as another node joins, wait for it to do so. Raises
    `TrainingError` when that happens or `distributed.timeout_minutes` are over, and `ConfigError` where nobody would.
    """
    least, timeout_minutes = settings.min_ranks, settings.timeout_minutes
    if who.world_size >= least:
        return who.world_size
    lacking = f"{counted(who.world_size, 'rank')} started, of at least {least} (distributed.min_ranks)"
    if not restarts_ranks():
        raise ConfigError(f"{lacking}: start more, or lower the setting")
    if who.rank == 0:
        print(f"dsdpo: {lacking}: waiting for more nodes to join", file=sys.stderr, flush=True)
    until = time.monotonic() + 60 * timeout_minutes
    while time.monotonic() < until:
        if noted_signal():
            raise TrainingError(f"{lacking}: ended while waiting for more")
        time.sleep(LOOK_S)
    raise TrainingError(f"{lacking}, and no node joined for {timeout_minutes:g} minutes (distributed.timeout_minutes)")


def shares_store() -> bool:
    """Whether ranks meet in a store of torchrun's own, which stays with the node that was the first at the start.

    Ranks that are started again on other nodes would meet nowhere, or among what others left in it (torch 2.13).
    """
    agents = os.environ.get("GROUP_WORLD_SIZE", "1")
    return restarts_ranks() and agents != "1" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
