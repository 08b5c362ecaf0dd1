"""Ranks meeting before they are a process group: who is there, who is awaited, and what one of them found wrong.

The place is the process group's store, which is there before any collective: a rank whose run file is wrong can say so
in it to the others, who would wait for that rank until the time limit.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore

import dsdpo.errors
from dsdpo.console import Launched, counted
from dsdpo.distributed import name_of, ranges
from dsdpo.errors import DsdpoError, TrainingError

NOTICE_S = 60.0  # after which whoever waits says for whom
AGAIN_S = 600.0  # and says it again
LOOK_S = 0.2  # between two looks
ANSWER = timedelta(seconds=60)  # of a store that has been reached
LINGER_S = 300.0  # that rank 0, which keeps the store, stays to tell slowly starting nodes of a mistake
LINGER_HERE_S = 2.0  # the same where one launcher ends all ranks
SEE = "see what the launcher (pdsh, srun, kubectl) said of the other nodes"


def meet(who: Launched, *, limit_s: float, mistake: DsdpoError | None = None) -> list[str]:
    """The host of every rank, once all are there. Collective, before all other collectives.

    A rank that has found a `mistake` brings it, and all ranks raise it. Raises `TrainingError` naming who is missing
    once `limit_s` is over, and torch's DistError where the port is taken.
    """
    until = time.monotonic() + limit_s
    store = _open(who, limit_s)
    place, host = f"dsdpo/meeting/{_attempt(who)}", socket.gethostname()
    if mistake is not None and store.add(f"{place}/mistakes", 1) == 1:
        told = [type(mistake).__name__, str(mistake), who.rank, host]
        store.set(f"{place}/mistake", json.dumps(told))
    store.set(f"{place}/host/{who.rank}", host)
    if store.add(f"{place}/count", 1) == who.world_size or mistake is not None:
        store.set(f"{place}/over", "")
    _await_others(store, place, who, until - time.monotonic())
    if store.check([f"{place}/mistake"]):
        kind, text, of_rank, of_host = json.loads(store.get(f"{place}/mistake"))
        _leave(store, place, who)
        error: DsdpoError = getattr(dsdpo.errors, kind)(f"{text} ({name_of(of_rank, of_host)})" if of_rank else text)
        error.agreed = True
        raise error
    return [host.decode() for host in store.multi_get([f"{place}/host/{rank}" for rank in range(who.world_size)])]


def _outlives_ranks() -> bool:
    """Whether torchrun keeps the store, with what earlier ranks have left in it; else it is rank 0's, and new."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _attempt(who: Launched) -> str:
    """What tells these ranks from earlier ones in the same store.

    torchrun's count of restarts names no attempt where nodes have agents of their own: when a host is lost, an agent
    whose rank has failed of it has counted one more than an agent that ended its rank to start it anew.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _outlives_ranks() else "0"
    return f"{count}-{who.world_size}"


def _open(who: Launched, limit_s: float) -> TCPStore:
    """The store of the process group to come, which torch opens again. Raises TrainingError if it is out of reach."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = who.rank == 0 and not _outlives_ranks()
    if not keeps:
        _await_answer(host, port, who, limit_s)
    store = TCPStore(
        host, port, who.world_size, is_master=keeps, timeout=ANSWER, wait_for_workers=False, multi_tenant=True
    )
    _kept.append(store)
    return store


_kept: list[TCPStore] = []  # or rank 0's would go, with all that it holds, before torch opens it again


def _await_answer(host: str, port: int, who: Launched, limit_s: float) -> None:
    """Wait until somebody listens there: torch's own waiting prints a C++ stack every few seconds."""
    began, notice_s = time.monotonic(), NOTICE_S
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:
            said = error.strerror or str(error)
        waited = time.monotonic() - began
        me, place = name_of(who.rank, socket.gethostname()), f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
        if waited > limit_s:
            raise TrainingError(f"{me} did not reach rank 0 at {place} within {limit_s / 60:g} minutes: {said}; {SEE}")
        if waited > notice_s:
            text = f"dsdpo ({me}): no answer of rank 0 at {place} for {waited:.0f} s: {said}; {SEE}"
            print(text, file=sys.stderr, flush=True)
            notice_s = waited + AGAIN_S
        time.sleep(LOOK_S)


def _await_others(store: TCPStore, place: str, who: Launched, limit_s: float) -> None:
    """Wait until all ranks are there or one has found a mistake; rank 0 says who is missing. Raises TrainingError."""
    began, notice_s = time.monotonic(), NOTICE_S
    while not store.check([f"{place}/over"]):
        waited = time.monotonic() - began
        if waited > limit_s:
            raise TrainingError(
                f"{_missing(store, place, who)}: not all met within distributed.timeout_minutes at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT); {SEE}"
            )
        if who.rank == 0 and waited > notice_s:
            print(f"dsdpo: {_missing(store, place, who)} after {waited:.0f} s; {SEE}", file=sys.stderr, flush=True)
            notice_s = waited + AGAIN_S
        time.sleep(LOOK_S)


def _missing(store: TCPStore, place: str, who: Launched) -> str:
    """Who is there and who is not, in words."""
    present: dict[str, list[int]] = {}
    absent = []
    for rank in range(who.world_size):
        key = f"{place}/host/{rank}"
        if store.check([key]):
            present.setdefault(store.get(key).decode(), []).append(rank)
        else:
            absent.append(rank)
    here = ", ".join(f"{host} ({ranges(ranks)})" for host, ranks in present.items())
    return f"{ranges(absent)} of {counted(who.world_size, 'rank')} did not come, only {here}"


def _leave(store: TCPStore, place: str, who: Launched) -> None:
    """Go once the mistake is known; rank 0, which keeps the store, when all have learned of it, or after a while."""
    with suppress(RuntimeError):
        store.add(f"{place}/left", 1)
        until = time.monotonic() + (LINGER_S if who.local_size < who.world_size else LINGER_HERE_S)
        while who.rank == 0 and time.monotonic() < until and store.add(f"{place}/left", 0) < who.world_size:
            time.sleep(LOOK_S)
