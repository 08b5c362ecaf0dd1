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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dsdpo
from dsdpo.distributed import all_or_none, barrier, gather_objects, rank, world_size
from dsdpo.engine.saving import TAG, load_engine, save_engine
from dsdpo.errors import CheckpointError
from dsdpo.reference.base import Reference
from dsdpo.training.metrics import Meter

STATE, MANIFEST = "state.json", "manifest.json"


@dataclass
class TrainState:
    """All progress of a run: the position in the data follows from one integer."""

    step: int = 0  # optimizer updates done
    consumed_pairs: int = 0  # pairs trained on, over all epochs


def save_checkpoint(
    folder: Path,
    state: TrainState,
    *,
    policy: Any,
    reference: Reference,
    meter: Meter,
    record: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder/step-000100`, then prune. Collective. `record` goes into `state.json`.

    Everything goes to `step-000100.partial`, is flushed to the disk, and gets its name by rename after all ranks have
    finished. DeepSpeed 0.19 would move its own `latest` before that, hence `save_latest=False`.
    """
    final = folder / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")
    with all_or_none(), writing(partial):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / TAG).mkdir(parents=True)
    # One agreement each: a rank whose disk is full must not miss the collectives of what is saved next.
    with all_or_none(), writing(partial):
        save_engine(policy, partial)
    with all_or_none(), writing(partial):
        reference.save(partial / "reference")
    with all_or_none(), writing(partial):
        save_file(rank_state(meter), rank_file(partial))
    barrier()
    with all_or_none(), writing(partial):
        if rank() == 0 and reference.identity is not None:
            (partial / "identity.json").write_text(json.dumps(reference.identity.to_json(), indent=2) + "\n")
    manifest = checksums(partial)
    with all_or_none(), writing(partial):
        if rank() == 0:
            progress = {**asdict(state), "world_size": world_size(), "dsdpo": dsdpo.__version__, **record}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            (partial / STATE).write_text(json.dumps(progress, indent=2) + "\n")
            _flush(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            for old in whole_checkpoints(folder)[:-keep_last]:
                shutil.rmtree(old)
    return final


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """A block in which what a full or failing disk raises becomes a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{partial}: {error}; the checkpoint was not written, earlier ones are intact") from error


def load_checkpoint(path: Path, *, policy: Any, reference: Reference, meter: Meter) -> TrainState:
    """Put everything back as `save_checkpoint` found it. Collective. For a checkpoint that `damage` finds whole."""
    load_engine(policy, path)
    with all_or_none():
        reference.load(path / "reference")
        restore_rank_state(load_file(rank_file(path)), meter)
    progress = read_state(path)
    return TrainState(step=progress["step"], consumed_pairs=progress["consumed_pairs"])


def rank_file(folder: Path) -> Path:
    """Where this rank keeps what no other rank has."""
    return folder / f"rank-{rank()}.safetensors"


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
    device = torch.device("cuda") if torch.cuda.is_initialized() else torch.device("cpu")
    names = [name for name in state if name.startswith("meter/")]
    meter.restore({name.removeprefix("meter/"): state[name].to(device) for name in names})


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file below `folder`, by its path there; ranks share the reading. Collective."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {}
    with all_or_none():
        for name in names[rank() :: world_size()]:
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
            mine[name] = digest.hexdigest()
    return {name: digest for part in gather_objects(mine) for name, digest in part.items()}


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank, or None. Collective."""
    wrong, manifest = "", {}
    try:
        read_state(path)
        manifest = json.loads((path / MANIFEST).read_text())
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
        content = json.loads((path / STATE).read_text())
        return content | {"step": int(content["step"]), "consumed_pairs": int(content["consumed_pairs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read: {error}") from error


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=lambda path: int(path.name[5:]))


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
