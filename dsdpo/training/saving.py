"""Save checkpoints, atomically: every file's checksum, then `state.json`, then one rename.

A save has two halves. `begin_checkpoint` takes the state of all parts of a run, and writes it or copies it into host
memory; then each rank writes, flushes and sums its own files, in a thread where they were copied, while training goes
on. `finish_checkpoint` gives the checkpoint its name once all ranks have done so. No collective runs in a thread.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import dsdpo
from dsdpo.atomic import digest_of_file, dump_checksummed, flush_to_disk, partial_path, write_json
from dsdpo.disks import Disk
from dsdpo.distributed import all_or_none, barrier, broadcast_object, max_over_ranks, rank, world_size
from dsdpo.engine.build import device
from dsdpo.engine.quirks.checkpoint_files import TAG, save_engine
from dsdpo.engine.quirks.put_off import HostCopies, Write
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError
from dsdpo.reference.base import Reference
from dsdpo.training.checkpoint import (
    MANIFEST,
    STATE,
    Retention,
    TrainState,
    all_checkpoints,
    all_sums,
    checkpoint_path,
    delete_checkpoint,
    delete_leftovers,
    rank_file,
    rank_state,
    superseded,
    writing,
)
from dsdpo.training.metrics import Meter
from dsdpo.training.parts import written_by

NICE = 10  # of a thread that writes: training comes first where both want a core


@dataclass
class Saving:
    """A checkpoint on its way to the disk."""

    final: Path
    disk: Disk
    progress: dict[str, Any]  # the content of state.json
    began: float
    written: Future[dict[str, str]]  # this rank's files, with their checksums
    seconds: float = 0.0  # that this rank took until its files were written

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return partial_path(self.final)

    def is_under_way(self) -> bool:
        """Whether any rank is still writing. Collective."""
        return bool(max_over_ranks(int(not self.written.done()), device()))


def begin_checkpoint(
    folder: Path,
    state: TrainState,
    *,
    policy: TrainingEngine,
    reference: Reference,
    meter: Meter,
    record: dict[str, Any],
    disk: Disk | None = None,
    copies: HostCopies | None = None,
) -> Saving:
    """Take a checkpoint of the run as it stands: written, or with `copies` being written by a thread. Collective.

    `record` goes into `state.json`. Everything goes to `step-000100.partial`; `finish_checkpoint` must follow.
    DeepSpeed 0.19 would move its own `latest` before all ranks have finished, hence `save_latest=False`. Raises
    `CheckpointError` where the disk fails, and gives back the room that was taken.
    """
    disk, began = disk or Disk((tuple(range(world_size())),)), time.monotonic()
    progress = {**asdict(state), "world_size": world_size(), "dsdpo": dsdpo.__version__, **deepcopy(record)}
    saving = Saving(checkpoint_path(folder, state.step), disk, progress, began, Future())
    try:
        writes = _take(saving, policy=policy, reference=reference, meter=meter, copies=copies)
    except CheckpointError:
        _give_up(saving)
        raise
    if copies is None:
        _write_own(saving, writes)
    else:
        work = partial(_write_behind, saving, writes)
        threading.Thread(target=work, daemon=True, name=f"writes {saving.final.name}").start()
    return saving


def _take(
    saving: Saving, *, policy: TrainingEngine, reference: Reference, meter: Meter, copies: HostCopies | None
) -> list[Write]:
    """Take the state of all parts; with `copies`, what is still to be written of it. Collective."""
    partial_folder, disk = saving.partial, saving.disk
    with all_or_none(), writing(partial_folder):
        if disk.leads:
            delete_leftovers(partial_folder.parent)
            (partial_folder / TAG).mkdir(parents=True)
            if reference.identity is not None:
                write_json(partial_folder / "identity.json", reference.identity.to_json())
    # One agreement each: a rank whose disk is full must not miss the collectives of what is saved next.
    with all_or_none(), writing(partial_folder):
        writes = save_engine(policy, partial_folder, copies)
    with all_or_none(), writing(partial_folder):
        if (own := reference.state()) is not None:
            writes += _now_or_later(partial(own.write, partial_folder / "reference"), copies)
    with all_or_none(), writing(partial_folder):
        file = rank_file(partial_folder, rank())
        writes += _now_or_later(partial(save_file, rank_state(meter), file), copies)
    return writes


def _now_or_later(write: Write, copies: HostCopies | None) -> list[Write]:
    if copies is not None:
        return [write]
    write()
    return []


def _write_behind(saving: Saving, writes: list[Write]) -> None:
    """`_write_own` in a thread of its own, to which training does not lose a core that it could use."""
    if sys.platform == "linux":  # elsewhere threads have no such priority of their own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    _write_own(saving, writes)


def _write_own(saving: Saving, writes: list[Write]) -> None:
    """Write what this rank has still to write, flush all its files to the disk and sum them."""
    try:
        while writes:
            writes.pop(0)()
        sums = {}
        for name_below in written_by(rank(), saving.partial, saving.disk):
            flush_to_disk(saving.partial / name_below)
            sums[name_below] = digest_of_file(saving.partial / name_below)
    except Exception as error:  # raised on all ranks by `finish_checkpoint`
        writes.clear()
        saving.written.set_exception(error)
    else:
        saving.seconds = time.monotonic() - saving.began
        saving.written.set_result(sums)


def finish_checkpoint(saving: Saving, keep: Retention) -> Path:
    """Give a checkpoint its name once all ranks have written it, and delete those that `keep` does not. Collective.

    By rename, on rank 0's disk last where the folder is on several. Raises `CheckpointError` where the disk of any rank
    has failed, and gives back the room that was taken.
    """
    final, partial_folder, disk = saving.final, saving.partial, saving.disk
    named = False
    try:
        with all_or_none(), writing(partial_folder):
            mine = saving.written.result()
        manifest, hosts = all_sums(mine)
        with all_or_none(), writing(partial_folder):
            if disk.leads:
                _write_lists(saving, manifest, hosts)
        with all_or_none(), writing(partial_folder):
            if disk.leads and rank():
                _rename(partial_folder, final)
                named = True
        with all_or_none(), writing(partial_folder):
            if rank() == 0:
                _rename(partial_folder, final)
    except CheckpointError:
        _give_up(saving, named=named)
        raise
    _delete_superseded(final.parent, keep, disk)
    return final


def _write_lists(saving: Saving, manifest: dict[str, str], hosts: dict[str, str]) -> None:
    """Write the list of all files and, last, `state.json`; flush them and all folders to the disk."""
    folder = saving.partial
    progress = saving.progress | ({} if saving.disk.shared else {"parts": hosts})
    for path, content in ((folder / MANIFEST, manifest), (folder / STATE, progress)):
        path.write_text(dump_checksummed(content))
        flush_to_disk(path)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            flush_to_disk(path)


def _rename(partial_folder: Path, final: Path) -> None:
    delete_checkpoint(final)  # of a run that went on from an earlier one
    partial_folder.rename(final)
    flush_to_disk(final.parent)


def _give_up(saving: Saving, *, named: bool = False) -> None:
    """Give back the room that a checkpoint has taken. Collective."""
    if saving.disk.leads:
        shutil.rmtree(saving.partial, ignore_errors=True)
    if named:  # rank 0's disk has no such checkpoint
        shutil.rmtree(saving.final, ignore_errors=True)
    barrier()


def _delete_superseded(folder: Path, keep: Retention, disk: Disk) -> None:
    """Delete older checkpoints, each disk its part. Collective."""
    whole = all_checkpoints(folder)
    gone = broadcast_object(superseded(whole, keep) if rank() == 0 else [])
    with all_or_none(), writing(folder):
        for old in gone if disk.leads else []:
            delete_checkpoint(old)
