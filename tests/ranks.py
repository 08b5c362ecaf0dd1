"""Real ranks for tests: gloo process groups on the CPU (NCCL under `make gpu`), kept alive from one test to the next.

    results = run_ranks(2, function, *arguments)     # function(*arguments) on two ranks; results by rank

The processes of a world size start once (forkserver, libraries preloaded) and keep their process group; importing
torch, deepspeed and transformers anew for each test would cost some 15 s a time. A group goes on after an error that
all ranks raised together, as dsdpo's own errors are (`all_or_none`). Any other error and any hang end the whole group,
since peers may be stuck in a collective; the next test gets a fresh one.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import pytest

TIMEOUT_S = 480
ON_CUDA = os.environ.get("DS_ACCELERATOR") == "cuda"
context: Any = multiprocessing.get_context("spawn" if ON_CUDA else "forkserver")  # CUDA cannot be used after a fork
if not ON_CUDA:
    context.set_forkserver_preload(["tests.preload"])
_groups: dict[int, list[tuple[Any, Connection]]] = {}
Outcome = Literal["returned", "refused", "failed"]  # refused: by an error of dsdpo's own


class RankError(AssertionError):
    """Raised in the test with the traceback of the rank that failed first."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `world_size` ranks at once; what each returned, by rank.

    Skips the test under `make gpu` where there are fewer GPUs.
    """
    if ON_CUDA and (gpus := _gpus()) < world_size:
        pytest.skip(f"needs {world_size} GPUs, and here is {gpus}")
    group = _groups.get(world_size) or _start(world_size)
    for _, connection in group:
        connection.send((function, arguments))
    answers: dict[int, tuple[Outcome, Any]] = {}
    pending = {connection: rank for rank, (_, connection) in enumerate(group)}
    while pending and all(outcome != "failed" for outcome, _ in answers.values()):
        ready = wait(list(pending), timeout=TIMEOUT_S)
        if not ready:
            _stop(world_size)
            raise RankError(f"ranks {sorted(pending.values())} gave no answer within {TIMEOUT_S} s{_said(answers)}")
        for connection in ready:
            rank = pending.pop(connection)
            try:
                answers[rank] = connection.recv()
            except EOFError:
                answers[rank] = ("failed", "the process ended")
    outcomes = {outcome for outcome, _ in answers.values()}
    if outcomes == {"returned"}:
        return [answers[rank][1] for rank in range(world_size)]
    if outcomes != {"refused"}:
        _stop(world_size)
    raise RankError(_said(answers))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _said(answers: dict[int, tuple[Outcome, Any]]) -> str:
    """The tracebacks of the ranks that raised, in the order in which they did."""
    return "".join(f"\nrank {rank}:\n{value}" for rank, (outcome, value) in answers.items() if outcome != "returned")


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
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world_size, str(store), theirs), daemon=True)
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

    import tests.preload  # noqa: F401 (is there already, or says why not)
    from dsdpo.engine.quirks.compiled_ops import skip_shared_memory_op
    from dsdpo.errors import DsdpoError, LostRankError

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
        answer: tuple[Outcome, Any]
        try:
            answer = ("returned", function(*arguments))
        except BaseException as error:
            together = isinstance(error, DsdpoError) and not isinstance(error, LostRankError)
            answer = ("refused" if together else "failed", traceback.format_exc())
        connection.send(answer)
