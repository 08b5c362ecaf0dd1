"""Real ranks for tests: gloo process groups on the CPU (NCCL under `make gpu`), kept alive from one test to the next.

    results = run_ranks(2, function, *arguments)     # function(*arguments) on two ranks; results by rank

The processes of a world size start once (forkserver, libraries preloaded) and keep their process group; importing
torch, deepspeed and transformers anew for each test would cost some 15 s a time. A rank that raises or hangs ends the
whole group, since its peers may be stuck in a collective; the next test gets a fresh one.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 480
ON_CUDA = os.environ.get("DS_ACCELERATOR") == "cuda"
_context: Any = multiprocessing.get_context("spawn" if ON_CUDA else "forkserver")  # CUDA cannot be used after a fork
if not ON_CUDA:
    _context.set_forkserver_preload(["torch", "deepspeed", "transformers", "dsdpo.engine.build"])
_groups: dict[int, list[tuple[Any, Connection]]] = {}


class RankError(AssertionError):
    """Raised in the test with the traceback of the rank that failed first."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `world_size` ranks at once; what each returned, by rank."""
    group = _groups.get(world_size) or _start(world_size)
    for _, connection in group:
        connection.send((function, arguments))
    results: dict[int, Any] = {}
    failure = None
    pending = {connection: rank for rank, (_, connection) in enumerate(group)}
    while pending and failure is None:
        ready = wait(list(pending), timeout=TIMEOUT_S)
        if not ready:
            failure = f"ranks {sorted(pending.values())} gave no answer within {TIMEOUT_S} s"
        for connection in ready:
            rank = pending.pop(connection)
            try:
                succeeded, value = connection.recv()
            except EOFError:
                succeeded, value = False, "the process ended"
            if succeeded:
                results[rank] = value
            else:
                failure = f"rank {rank}:\n{value}"
    if failure is not None:
        _stop(world_size)
        raise RankError(failure)
    return [results[rank] for rank in range(world_size)]


def restart(world_size: int) -> None:
    """New processes for the next test: for what DeepSpeed can set up only once in a process, such as hpZ's groups."""
    if world_size in _groups:
        _stop(world_size)


def stop_all() -> None:
    """End every group; called once after the last test."""
    for world_size in list(_groups):
        _stop(world_size)


def _start(world_size: int) -> list[tuple[Any, Connection]]:
    store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
    group = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(rank, world_size, str(store), theirs), daemon=True)
        process.start()
        theirs.close()
        group.append((process, ours))
    _groups[world_size] = group
    return group


def _stop(world_size: int) -> None:
    for process, connection in _groups.pop(world_size):
        connection.close()
        process.kill()
        process.join()


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    import deepspeed
    import torch

    from dsdpo.engine.quirks.compiled_ops import skip_shared_memory_op

    torch.set_num_threads(1)
    skip_shared_memory_op()
    if ON_CUDA:
        torch.cuda.set_device(rank)
    backend = "nccl" if ON_CUDA else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    deepspeed.init_distributed(verbose=False)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
