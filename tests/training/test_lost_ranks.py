"""A rank that is cut off ends by itself: a connection without its other end says nothing at all."""

from __future__ import annotations

import signal
import socket
import subprocess

from tests.commands.processes import environment_of, free_port
from tests.warm import warm_python

LIMIT_S = 240
# Rank 0 freezes, with the store that it keeps: to rank 1 that is what a pulled cable is, a peer without a word.
FREEZES = """
import os, signal
from datetime import timedelta
from dsdpo.engine.start import start_distributed
start_distributed(timeout_minutes=30)
import torch.distributed as dist
from dsdpo.distributed import learn_hosts
from dsdpo.training.lost_ranks import watched_ranks
learn_hosts()
with watched_ranks(lost_after=timedelta(seconds=3)):
    dist.barrier()
    if dist.get_rank() == 0:
        print("frozen", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
"""


def test_a_rank_that_is_cut_off_ends_by_itself() -> None:
    port, ranks = str(free_port()), []
    for rank in range(2):
        who = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        env = environment_of(**who, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        ranks.append(subprocess.Popen([warm_python(), "-c", FREEZES], stderr=subprocess.PIPE, text=True, env=env))
    try:
        _, said = ranks[1].communicate(timeout=LIMIT_S)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert ranks[1].returncode == 1
    assert f"dsdpo (rank 1 on {socket.gethostname()}): " in said
    assert "this node is cut off, or rank 0's is" in said or "gave no sign of life for 3 s" in said
    assert "Go on with --resume auto" in said
