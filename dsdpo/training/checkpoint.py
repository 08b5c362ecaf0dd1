"""Checkpoints that exist only when they are whole: every file's checksum, then `state.json`, then one rename.

A checkpoint holds DeepSpeed's files of the policy engine, the reference's state, and one file a rank with its random
number generators and half-read metrics. `state.json` says how far the run was, and under which settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dsdpo
from dsdpo.distributed import all_or_none, barrier, gather_objects, rank, world_size
from dsdpo.engine.quirks.checkpoint_files import TAG, load_engine, save_engine
from dsdpo.errors import CheckpointError
from dsdpo.reference.base import Reference
from dsdpo.training.metrics import Meter
from dsdpo.training.pruning import Keep, remove, superseded, sweep
from dsdpo.training.seal import sealed, unsealed

STATE, MANIFEST = "state.json", "manifest.json"


@dataclass
class TrainState:
    """All progress of a run: the position in the data follows from one integer."""

    step: int = 0  # optimizer updates done
    consumed_pairs: int = 0  # pairs trained on, over all epochs
    means: dict[str, float] = field(default_factory=dict)  # running means of the loss, and the best evaluation so far


def save_checkpoint(
    folder: Path,
    state: TrainState,
    *,
    policy: Any,
    reference: Reference,
    meter: Meter,
    record: dict[str, Any],
    keep: Keep,
) -> Path:
    """Write `folder/step-000100`, then delete those that `keep` does not keep. Collective.

    `record` goes into `state.json`. Everything goes to `step-000100.partial`, is flushed to the disk, and gets its name
    by rename after all ranks have finished. DeepSpeed 0.19 would move its own `latest` before that, hence
    `save_latest=False`. Raises `CheckpointError` where the disk fails, and gives back the room that was taken.
    """
    final = folder / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")
    try:
        _write(partial, state, policy=policy, reference=reference, meter=meter, record=record)
        with all_or_none(), writing(partial):
            if rank() == 0:
                _flush_all(partial)
                remove(final)  # of a run that went on from an earlier one
                partial.rename(final)
                _flush_one(folder)
                for old in superseded(whole_checkpoints(folder), keep):
                    remove(old)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        barrier()
        raise
    return final


def _write(
    partial: Path, state: TrainState, *, policy: Any, reference: Reference, meter: Meter, record: dict[str, Any]
) -> None:
    """Everything of a checkpoint, its state last. Collective."""
    with all_or_none(), writing(partial):
        if rank() == 0:
            sweep(partial.parent)
            (partial / TAG).mkdir(parents=True)
    # One agreement each: a rank whose disk is full must not miss the collectives of what is saved next.
    with all_or_none(), writing(partial):
        save_engine(policy, partial)
    with all_or_none(), writing(partial):
        reference.save(partial / "reference")
    with all_or_none(), writing(partial):
        save_file(rank_state(meter), rank_file(partial, rank()))
    barrier()
    with all_or_none(), writing(partial):
        if rank() == 0 and reference.identity is not None:
            (partial / "identity.json").write_text(json.dumps(reference.identity.to_json(), indent=2) + "\n")
    manifest = checksums(partial)
    with all_or_none(), writing(partial):
        if rank() == 0:
            progress = {**asdict(state), "world_size": world_size(), "dsdpo": dsdpo.__version__, **record}
            (partial / MANIFEST).write_text(sealed(manifest))
            (partial / STATE).write_text(sealed(progress))


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """A block in which what a full or failing disk raises becomes a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{partial}: {error}; the checkpoint was not written, earlier ones are intact") from error


def load_checkpoint(path: Path, *, policy: Any, reference: Reference, meter: Meter, seed: int) -> TrainState:
    """Put everything back as `save_checkpoint` found it. Collective. For a checkpoint that `damage` finds whole.

    Another number of ranks deals out anew what was counted, and draws its random numbers from `seed`, the step and the
    rank.
    """
    load_engine(policy, path)
    progress = read_state(path)
    with all_or_none():
        reference.load(path / "reference")
        if progress["world_size"] == world_size():
            restore_rank_state(load_file(rank_file(path, rank())), meter)
        else:
            key = hashlib.sha256(f"{seed}/{progress['step']}/{rank()}".encode())
            torch.manual_seed(int.from_bytes(key.digest()[:7], "big"))
            restore_meter(dealt_sums(path, progress["world_size"]), meter)
    return TrainState(step=progress["step"], consumed_pairs=progress["consumed_pairs"], means=progress.get("means", {}))


def rank_file(folder: Path, of_rank: int) -> Path:
    """Where a rank keeps what no other rank has."""
    return folder / f"rank-{of_rank}.safetensors"


def rank_state(meter: Meter) -> dict[str, torch.Tensor]:
    """This rank's random number generators and what it has counted since metrics were last read."""
    state = {f"meter/{name}": sums.cpu() for name, sums in meter.state().items()}
    state["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rank_state(state: dict[str, torch.Tensor], meter: Meter) -> None:
    """Take up what `rank_state` gave."""
    torch.set_rng_state(state["rng/cpu"])
    if "rng/cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["rng/cuda"])
    restore_meter(meter_sums(state), meter)


def meter_sums(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `rank_state` says was counted."""
    return {name.removeprefix("meter/"): sums for name, sums in state.items() if name.startswith("meter/")}


def restore_meter(sums: dict[str, torch.Tensor], meter: Meter) -> None:
    """Have the meter go on from these sums, on the device it counts on."""
    device = torch.device("cuda") if torch.cuda.is_initialized() else torch.device("cpu")
    meter.restore({name: value.to(device) for name, value in sums.items()})


def dealt_sums(folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    """This rank's share of what `ranks` ranks had counted: over all of today's ranks the sums are the same.

    Every rank gets every name, in the same order, as the meter's all-reduce needs.
    """
    total = {name: torch.zeros_like(sums) for name, sums in meter_sums(load_file(rank_file(folder, 0))).items()}
    for old in range(rank(), ranks, world_size()):
        counted = meter_sums(load_file(rank_file(folder, old)))
        total = {name: sums + counted[name] for name, sums in total.items()}
    return total


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file below `folder`, by its path there; ranks share the reading. Collective."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {}
    with all_or_none():
        for name in names[rank() :: world_size()]:
            digest = hashlib.sha256()
            try:
                with (folder / name).open("rb") as file:
                    while chunk := file.read(1 << 24):
                        digest.update(chunk)
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
            mine[name] = digest.hexdigest()
    return {name: digest for part in gather_objects(mine) for name, digest in part.items()}


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank, or None. Collective."""
    wrong, manifest = "", {}
    try:
        read_state(path)
        manifest = unsealed((path / MANIFEST).read_text())
    except CheckpointError as error:
        wrong = str(error)
    except (OSError, ValueError) as error:
        wrong = f"{MANIFEST} cannot be read: {error}"
    if reports := [report for report in gather_objects(wrong) if report]:
        return reports[0]
    found = checksums(path)
    missing = sorted(manifest.keys() - found.keys())
    changed = sorted(name for name in manifest.keys() & found.keys() if manifest[name] != found[name])
    if missing:
        return f"{missing[0]} is missing"
    return f"{changed[0]} is not what was written" if changed else None


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`."""
    try:
        content = unsealed((path / STATE).read_text())
        return content | {"step": int(content["step"]), "consumed_pairs": int(content["consumed_pairs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read: {error}") from error


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=lambda path: int(path.name[5:]))


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    """Have a folder's names, or a file's content, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
