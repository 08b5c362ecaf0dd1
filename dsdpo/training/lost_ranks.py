"""Noticing that a rank is gone, and saying which: gloo names a socket, NCCL waits until its collective times out.

Every rank gives a sign of life each second in the process group's store, from a thread; rank 0 looks for everyone's,
the others for rank 0's. When a rank fails, the signs say which one fell silent and the notes that ranks leave when they
end say which was the first. A rank that is cut off hangs in its own question to the store, since a connection without
its other end says nothing for a quarter of an hour: so a second thread looks at how long ago the store last answered.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from dsdpo.distributed import name_of, own_store, rank, world_size
from dsdpo.errors import DsdpoError, LostRankError

BEAT_S = 1.0
SILENT_S = 6.0  # without a sign of life, once something has failed
LOST = 1  # exit code
CUT_OFF = "rank 0's store gave no answer for {:.0f} s: this node is cut off, or rank 0's is"
ENDED = "the process group's store, which rank 0 keeps, no longer answers: rank 0 is gone"

LAST_WORDS: list[Callable[[str], None]] = []
"""Called with the reason before this process is ended for a lost rank, of which nothing else would be told."""

_meetings = 0  # of this process: all ranks count alike


@contextmanager
def watched_ranks(*, lost_after: timedelta) -> Iterator[None]:
    """A block in which a lost rank ends the others with a message that names it. Collective.

    What a collective raises when a rank is gone becomes `LostRankError`. Where the collective only waits, as NCCL's do,
    this process is ended once a rank has given no sign of life for `lost_after`.
    """
    if world_size() == 1:
        yield
        return
    peers = Peers(lost_after_s=lost_after.total_seconds())
    try:
        yield
    except Exception as error:
        first = peers.note_end(error)
        if not isinstance(error, DsdpoError):  # of which all ranks know already
            # Launchers end all ranks as soon as one is gone: not before these have said which.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            reason = peers.explain(first)
            if reason is not None:
                raise LostRankError(f"{reason}. Go on with --resume auto") from error
        raise
    finally:
        peers.leave()


class Peers:
    """This rank's signs of life, and what it knows of the others'."""

    def __init__(self, *, lost_after_s: float) -> None:
        global _meetings
        _meetings += 1
        self._prefix = f"dsdpo/peers/{_meetings}"
        self._lost_after_s = lost_after_s
        self._left = threading.Event()
        self._store = own_store()
        self._store.set(self._key("who", rank()), f"rank {rank()} ({socket.gethostname()}, process {os.getpid()})")
        self._answered = time.monotonic()  # when the store last did
        self._threads = [
            threading.Thread(target=self._watch, args=(own_store(),), daemon=True, name="peers"),
            threading.Thread(target=self._mind_silence, daemon=True, name="silence"),
        ]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Give no more signs of life, and look for none."""
        self._left.set()
        for thread in self._threads:
            thread.join(5 * BEAT_S)  # one that hangs in a question is left to itself

    def note_end(self, error: Exception) -> bool:
        """Write what ends this rank into the store, for the others to name; whether it is the first rank to do so."""
        try:
            first = int(self._store.add(f"{self._prefix}/ends", 1)) == 1
            text = str(error).strip().splitlines()[:1] or [""]
            self._store.set(self._key("end", rank()), f"{type(error).__name__}: {text[0]}")
            if first:
                self._store.set(f"{self._prefix}/first", str(rank()))
            return first
        except RuntimeError:
            return False

    def explain(self, first: bool) -> str | None:
        """Which rank is gone, or ended first; None if this one is the cause. Waits some seconds."""
        try:
            silent = self._silent_ranks()
            if rank() == 0:
                time.sleep(BEAT_S)  # the store ends with this process, and the others may still be asking
            if silent:
                names = [self._store.get(self._key("who", peer)).decode() for peer in silent]
                return f"{' and '.join(names)} died or lost the connection, without a word"
            if first or not self._store.check([f"{self._prefix}/first"]):
                return None
            cause = int(self._store.get(f"{self._prefix}/first"))
            who, end = (self._store.get(self._key(what, cause)).decode() for what in ("who", "end"))
            return f"{who} ended with {end}"
        except RuntimeError:
            return ENDED

    def _silent_ranks(self) -> list[int]:
        """The ranks that neither gave a sign of life for SILENT_S nor said why they end."""
        others = [peer for peer in range(world_size()) if peer != rank()]
        before = self._beats_of(self._store, others)
        until = time.monotonic() + SILENT_S
        while others and time.monotonic() < until:
            time.sleep(BEAT_S / 4)
            now = self._beats_of(self._store, others)
            others = [
                peer for peer in others if now[peer] == before[peer] and not self._store.check([self._key("end", peer)])
            ]
        return others

    def _watch(self, store: Any) -> None:
        """Give signs of life and look for others' until `leave`; ends the process when a rank is lost."""
        watched = range(1, world_size()) if rank() == 0 else (0,)
        heard = dict.fromkeys(watched, (b"", time.monotonic()))
        beats = 0
        while not self._left.wait(BEAT_S):
            beats += 1
            try:
                store.set(self._key("beat", rank()), str(beats))
                for peer, beat in self._beats_of(store, watched).items():
                    if beat != heard[peer][0]:
                        heard[peer] = beat, time.monotonic()
                if rank() == 0:
                    self._tell(store, [peer for peer in watched if self._is_lost(heard[peer][1])])
                lost = store.get(f"{self._prefix}/lost").decode() if store.check([f"{self._prefix}/lost"]) else ""
                lost = lost or (name_of(0) if rank() and self._is_lost(heard[0][1]) else "")
            except RuntimeError:
                # Rank 0 is gone, unless its machine is only slow; the main thread may say so first, or wait for ever.
                lost = ""
                if self._is_lost(self._answered):
                    self._end_process(ENDED)
                self._left.wait(self._lost_after_s / 5)  # each attempt prints a C++ stack
            else:
                self._answered = time.monotonic()
            if lost and not self._left.is_set():
                self._end_process(f"{lost} gave no sign of life for {self._lost_after_s:.0f} s")

    def _mind_silence(self) -> None:
        """End the process once the store has not answered for too long, wherever other threads hang."""
        while not self._left.wait(BEAT_S):
            # The thread that asks can tell more, and has the first word.
            if time.monotonic() - self._answered > self._lost_after_s + 2 * BEAT_S:
                self._end_process(CUT_OFF.format(self._lost_after_s))

    def _tell(self, store: Any, lost: list[int]) -> None:
        if lost:
            names = [store.get(self._key("who", peer)).decode() for peer in lost]
            store.set(f"{self._prefix}/lost", " and ".join(names))

    def _is_lost(self, heard_at: float) -> bool:
        return time.monotonic() - heard_at > self._lost_after_s

    def _end_process(self, reason: str) -> None:
        """End this process from beside a main thread that hangs in a collective."""
        who = name_of(rank(), socket.gethostname())
        print(f"dsdpo ({who}): {reason}. Go on with --resume auto", file=sys.stderr, flush=True)
        for say in list(LAST_WORDS):
            with suppress(Exception):
                say(reason)
        if rank() == 0:
            time.sleep(5 * BEAT_S)  # the others hear of it from the store that ends with this process
        os._exit(LOST)

    def _beats_of(self, store: Any, peers: Sequence[int]) -> dict[int, bytes]:
        """The latest signs of life, none of a rank that has not begun."""
        keys = [self._key("beat", peer) for peer in peers]
        if store.check(keys):
            return dict(zip(peers, store.multi_get(keys), strict=True))  # one question, however many ranks
        return {peer: store.get(key) if store.check([key]) else b"" for peer, key in zip(peers, keys, strict=True)}

    def _key(self, what: str, of_rank: int) -> str:
        return f"{self._prefix}/{what}/{of_rank}"
