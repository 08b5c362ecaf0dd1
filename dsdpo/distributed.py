"""The few things ranks tell each other outside an engine. Every function that says "Collective." needs all ranks."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from dsdpo.errors import DsdpoError

T = TypeVar("T")
STORE_ANSWERS = timedelta(seconds=20)
SIGN_S, SILENT_S = 2.0, 300.0  # between signs of life of a rank that others wait for, and until it counts as lost
PIECE = 1 << 22  # elements of an array that travel at once


def rank() -> int:
    """This process among all, 0 when there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


_place: int | None = None  # among the processes of the node, where LOCAL_RANK has become the number of a device


def local_rank() -> int:
    """This process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _place is None else _place


def number_device(index: int) -> None:
    """Let LOCAL_RANK, which DeepSpeed takes for the number of this process's device, be `index`."""
    global _place
    if index != local_rank():
        _place = local_rank()
        names = {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys()  # it wants both to be the same
        os.environ.update(dict.fromkeys(names, str(index)))


def node() -> int:
    """A number of this process's node, the same for all its ranks and no other node's."""
    slurm = os.environ.get("SLURM_NODEID")  # tasks may be dealt out to nodes by turns
    if slurm is not None and os.environ.get("SLURM_PROCID") == str(rank()):
        return int(slurm)
    return rank() - local_rank()


def name_of(of_rank: int, host: str | None = None) -> str:
    """A rank as messages name it, with its host once that is known."""
    host = host or (_hosts[of_rank] if of_rank < len(_hosts) else None)
    return f"rank {of_rank}" + (f" on {host}" if host else "")


_hosts: list[str] = []  # by rank, since `learn_hosts`


def learn_hosts() -> list[str]:
    """The host of every rank, by which messages name them from now on. Collective."""
    _hosts[:] = gather_objects(socket.gethostname())
    return _hosts


def ranges(ranks: Sequence[int]) -> str:
    """Ascending ranks in few words: rank 3; ranks 0-3, 7."""
    parts: list[list[int]] = []
    for one in ranks:
        if parts and parts[-1][-1] == one - 1:
            parts[-1][1:] = [one]
        else:
            parts.append([one])
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join('-'.join(map(str, part)) for part in parts)}"


def by_host(ranks: Sequence[int]) -> str:
    """Ascending ranks with their hosts: node-1 (ranks 0-3), node-2 (rank 4)."""
    hosts: dict[str, list[int]] = {}
    for one in ranks:
        hosts.setdefault(_hosts[one] if one < len(_hosts) else "a host", []).append(one)
    return ", ".join(f"{host} ({ranges(theirs)})" for host, theirs in hosts.items())


def barrier() -> None:
    """Collective."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank. Collective; for small objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's value. Collective; for small objects."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all ranks' values. Collective; waits for the device once."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def values_of_ranks(value: float, device: torch.device) -> list[float]:
    """Every rank's value, by rank. Collective; waits for the device once."""
    if world_size() == 1:
        return [value]
    values = torch.zeros(world_size(), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(values, torch.tensor([value], dtype=torch.float64, device=device))
    found: list[float] = values.tolist()
    return found


def sum_over_ranks(array: np.ndarray, device: torch.device) -> np.ndarray:
    """The sum of all ranks' arrays, in pieces that go over `device`. Collective."""
    if world_size() == 1:
        return array
    result = np.array(array, order="C")
    flat = result.reshape(-1)
    for start in range(0, len(flat), PIECE):
        piece = torch.from_numpy(flat[start : start + PIECE]).to(device)
        dist.all_reduce(piece)
        flat[start : start + PIECE] = piece.cpu().numpy()
    return result


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that may fail on some ranks only: afterwards it has failed on all or on none. Collective at its end.

    Ranks whose own block went well raise the first failing rank's error, with that rank named if it is not rank 0.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = gather_objects(None if error is None else (type(error), str(error), socket.gethostname()))
    if error is not None:
        raise error
    for failed_rank, failure in enumerate(failures):
        if failure is not None:
            kind, message, host = failure
            note = f" ({name_of(failed_rank, host)})" if failed_rank else ""
            raise (
                kind(message + note)
                if issubclass(kind, DsdpoError)
                else DsdpoError(f"{kind.__name__}: {message}{note}")
            )


def own_store() -> Any:
    """A connection of one's own to the process group's store: another thread's waiting would block a shared one."""
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()
    store.set_timeout(STORE_ANSWERS)
    return store


_shifts = 0  # of `on_some_ranks` in this process: all ranks count alike


def on_some_ranks(works: bool, work: Callable[[], T], *, silent_s: float = SILENT_S) -> T | None:
    """What `work` gives on the ranks that do it; the others wait for as long as it takes, and get None. Collective.

    Unlike in a collective of the process group, waiting has no time limit: only when no working rank has given a sign
    of life for `silent_s` is it an error. What `work` raises is raised on all ranks.
    """
    global _shifts
    _shifts += 1
    with all_or_none():
        if world_size() == 1:
            return work() if works else None
        shift = f"dsdpo/shift/{_shifts}"
        store, stop = own_store(), threading.Event()
        beat = threading.Thread(target=_give_signs, args=(shift, stop), daemon=True, name="signs of life")
        try:
            if works:
                beat.start()
            result = work() if works else None
        finally:
            stop.set()
            store.set(f"{shift}/done/{rank()}", "")
        _await_all(store, shift, silent_s)
    return result


def _give_signs(shift: str, stop: threading.Event) -> None:
    """Count up until told to stop."""
    with suppress(RuntimeError):  # rank 0, which keeps the store, is gone: whoever waits says so
        store = own_store()
        while not stop.wait(SIGN_S):
            store.add(f"{shift}/signs", 1)


def _await_all(store: Any, shift: str, silent_s: float) -> None:
    """Wait until all ranks have done their share. Raises DsdpoError once there is neither that nor a sign of life."""
    keys = [f"{shift}/done/{peer}" for peer in range(world_size())]
    signs, heard = -1, time.monotonic()
    try:
        while not store.check(keys):
            now = store.add(f"{shift}/signs", 0)
            if now != signs:
                signs, heard = now, time.monotonic()
            if time.monotonic() - heard > silent_s:
                missing = [name_of(peer) for peer, key in enumerate(keys) if not store.check([key])]
                raise DsdpoError(
                    f"{' and '.join(missing)} gave no sign of life for {silent_s:.0f} s while others waited for "
                    "its data: see what became of its process"
                )
            time.sleep(0.2)
    except RuntimeError as error:
        raise DsdpoError("the process group's store no longer answers: rank 0 is gone") from error


def met(where: str, seconds: float) -> bool:
    """Wait until all ranks have come to `where`, at most `seconds`; whether they have.

    For when some ranks may be gone already: never raises. A `where` serves once.
    """
    if world_size() == 1:
        return True
    keys = [f"dsdpo/{where}/{peer}" for peer in range(world_size())]
    until = time.monotonic() + seconds
    try:
        store = own_store()
        store.set(keys[rank()], "")
        while time.monotonic() < until:
            if store.check(keys):
                return True
            time.sleep(0.05)
    except RuntimeError:
        return False  # rank 0, which keeps the store, is gone
    return False


def part(seconds: float) -> None:
    """Wait until all ranks have come here, rank 0, which keeps the store, last; at most `seconds`.

    For the end of a process: never raises.
    """
    if met("part", seconds) and world_size() > 1 and rank() == 0:
        time.sleep(0.2)  # for the others' last question
