"""What a checkpoint is, how it is loaded and checked, and which ones stay; `saving.py` writes them.

A checkpoint holds DeepSpeed's files of the policy engine, the reference's state, and one file a rank with its random
number generators and the metrics counted since the last row. `state.json` has the progress and settings of the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dsdpo.atomic import (
    delete_atomically,
    digest_of_file,
    load_checksummed,
    write_text,
)
from dsdpo.disks import Disk, find_disk
from dsdpo.distributed import all_or_none, gather_objects, rank, world_size
from dsdpo.engine.build import device
from dsdpo.engine.quirks.checkpoint_files import TAG, load_engine
from dsdpo.engine.quirks.repartition import same_layout
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError
from dsdpo.reference.base import Reference
from dsdpo.training.metrics import Meter
from dsdpo.training.parts import bring, files_below, read_by

STATE, MANIFEST = "state.json", "manifest.json"
DELETING = ".old"  # the suffix of a checkpoint that is being deleted
LOWER_IS_BETTER = {"loss", "nll", "perplexity", "ties", "drift", "calibration_error"}


@dataclass
class TrainState:
    """The progress of a run."""

    step: int = 0  # optimizer updates done
    consumed_pairs: int = 0  # pairs trained on, over all epochs
    means: dict[str, float] = field(default_factory=dict)  # running means of the loss, and the best evaluation so far


@dataclass(frozen=True)
class Retention:
    """How many checkpoints are kept."""

    last: int  # newest ones, at least 1
    best: int = 0  # best ones by `metric`; may be among the newest
    metric: str = "eval/loss"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return folder / f"step-{step:06d}"


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Turns the errors of a full or failing disk into `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        host = socket.gethostname()
        raise CheckpointError(
            f"{partial} on {host}: {error}; the checkpoint was not written, earlier ones are intact"
        ) from error


def load_checkpoint(path: Path, *, policy: TrainingEngine, reference: Reference, meter: Meter, seed: int) -> TrainState:
    """Restore everything that a save has put into it, from a checkpoint without damage. Collective.

    On another number of ranks the sums of metrics are redistributed, and random numbers follow from `seed`, the step
    and the rank.
    """
    progress = read_state(path)
    bring_parts(path, policy, reference)
    load_engine(policy, path)
    with all_or_none():
        reference.load(path / "reference")
        if progress["world_size"] == world_size():
            restore_rank_state(load_file(rank_file(path, rank())), meter)
        else:
            key = hashlib.sha256(f"{seed}/{progress['step']}/{rank()}".encode())
            torch.manual_seed(int.from_bytes(key.digest()[:7], "big"))
            restore_meter(redistributed_sums(path, progress["world_size"]), meter)
    return TrainState(step=progress["step"], consumed_pairs=progress["consumed_pairs"], means=progress.get("means", {}))


def bring_parts(path: Path, policy: TrainingEngine, reference: Reference | None = None) -> None:
    """Put on this rank's disk what `load_checkpoint` will read and only others have. Collective."""
    files = load_checksummed((path / MANIFEST).read_text())
    own = read_by(rank(), list(files))
    if reference is not None and reference.reads_all_ranks:
        own |= {name for name in files if name.startswith("reference/")}
    as_before = read_state(path)["world_size"] == world_size()
    several = bring(path, own if as_before else set(files))
    if several and as_before and not same_layout(policy, path / TAG):
        bring(path, set(files))


def rank_file(folder: Path, of_rank: int) -> Path:
    """The file of a rank's own state."""
    return folder / f"rank-{of_rank}.safetensors"


def rank_state(meter: Meter) -> dict[str, torch.Tensor]:
    """Copies of this rank's random number generators and of its sums of metrics since they were last read."""
    state = {f"meter/{name}": sums.to("cpu", copy=True) for name, sums in meter.state().items()}
    state["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rank_state(state: dict[str, torch.Tensor], meter: Meter) -> None:
    """Restore what `rank_state` gave."""
    torch.set_rng_state(state["rng/cpu"])
    if "rng/cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["rng/cuda"])
    restore_meter(meter_sums(state), meter)


def meter_sums(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of metrics in what `rank_state` gave."""
    return {name.removeprefix("meter/"): sums for name, sums in state.items() if name.startswith("meter/")}


def restore_meter(sums: dict[str, torch.Tensor], meter: Meter) -> None:
    """Set the meter to these sums, on the device that it sums on."""
    meter.restore({name: value.to(device()) for name, value in sums.items()})


def redistributed_sums(folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    """This rank's share of the sums of `ranks` ranks, whose total over today's ranks is the same.

    Every rank gets every name, in the same order, as the meter's all-reduce needs.
    """
    total = {name: torch.zeros_like(sums) for name, sums in meter_sums(load_file(rank_file(folder, 0))).items()}
    for old in range(rank(), ranks, world_size()):
        counted = meter_sums(load_file(rank_file(folder, old)))
        total = {name: sums + counted[name] for name, sums in total.items()}
    return total


def checksums(folder: Path, disk: Disk) -> dict[str, str]:
    """The sha256 of each file below `folder` on any disk, by its path there. Collective.

    The ranks of a disk share the reading.
    """
    names, place = files_below(folder), disk.members.index(rank())
    mine = {}
    with all_or_none():
        for name in names[place :: len(disk.members)]:
            try:
                mine[name] = digest_of_file(folder / name)
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
    return all_sums(mine)[0]


def all_sums(mine: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The checksums of all ranks' files, and a host that has each file. Collective."""
    digests: dict[str, str] = {}
    hosts: dict[str, str] = {}
    for found, host in gather_objects((mine, socket.gethostname())):
        for name, digest in found.items():
            if digests.setdefault(name, digest) != digest:
                digests[name] = f"two files of that name, one on {host}"
            hosts.setdefault(name, host)
    return digests, hosts


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files on all disks, the same on every rank, or None. Collective.

    A disk that has no part of it is given the list of files, by which it can be taken up there.
    """
    disk = find_disk(path.parent, key="output_dir")
    parts = gather_objects(_read_part(path))
    found = [part for part in parts if isinstance(part, tuple)]
    wrong = [part for part in parts if isinstance(part, str)]
    if wrong or not found:
        return (wrong or [f"{STATE} is missing"])[0]
    state, manifest = found[0]
    if any(part != found[0] for part in found):
        return "its parts on different disks were not written by the same save"
    files, hosts = load_checksummed(manifest), load_checksummed(state).get("parts", {})
    digests = checksums(path, disk)
    if missing := sorted(files.keys() - digests.keys()):
        where = f", which lay on {hosts[missing[0]]}'s own disk" if missing[0] in hosts else ""
        return f"{missing[0]} is missing{where}"
    if changed := sorted(name for name in files if files[name] != digests[name]):
        return f"{changed[0]} is not what was written"
    with all_or_none(), writing(path):
        if disk.leads and not (path / STATE).exists():
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / MANIFEST, manifest)
            write_text(path / STATE, state)
    bring(path, {name for name in files if "/" not in name and name.endswith(".json")})
    return None


def _read_part(path: Path) -> tuple[str, str] | str | None:
    """The text of `state.json` and of the list of files on this rank's disk, or what is wrong; None without a part."""
    if not path.exists():
        return None
    try:
        read_state(path)
        texts = (path / STATE).read_text(), (path / MANIFEST).read_text()
        load_checksummed(texts[1])
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return texts


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`."""
    try:
        content = load_checksummed((path / STATE).read_text())
        return content | {"step": int(content["step"]), "consumed_pairs": int(content["consumed_pairs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read: {error}") from error


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=lambda path: int(path.name[5:]))


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of which any disk has a finished part, oldest first, the same on all ranks. Collective."""
    names = {path.name for paths in gather_objects(whole_checkpoints(folder)) for path in paths}
    return [folder / name for name in sorted(names, key=lambda name: int(name[5:]))]


def superseded(whole: Sequence[Path], keep: Retention) -> list[Path]:
    """Those of the whole checkpoints, given oldest first, that are neither among the newest nor among the best.

    A checkpoint of a step that was not evaluated is not among the best; of equals the newer one is the better.
    """
    kept = set(whole[-keep.last :])
    if keep.best:
        scores = {path: score(path, keep.metric) for path in whole}
        found = [path for path in reversed(whole) if scores[path] is not None]
        kept.update(sorted(found, key=lambda path: sign(keep.metric) * (scores[path] or 0.0))[: keep.best])
    return [path for path in whole if path not in kept]


def sign(metric: str) -> float:
    """1 if a lower value of a metric is better, -1 if a higher one is."""
    return 1.0 if LOWER_IS_BETTER & set(metric.split("/")) else -1.0


def score(path: Path, metric: str) -> float | None:
    """A held-out metric in a checkpoint's state, None if its step was not evaluated."""
    try:
        value = float(json.loads((path / STATE).read_text())["evaluation"][metric])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if math.isfinite(value) else None


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint atomically."""
    delete_atomically(path, by_way_of=path.with_suffix(DELETING))


def delete_leftovers(folder: Path) -> None:
    """Delete what interrupted saving and deleting left behind."""
    for suffix in (".partial", DELETING):
        for path in folder.glob(f"step-*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
