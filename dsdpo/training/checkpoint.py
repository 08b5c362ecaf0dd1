"""Save and load checkpoints, atomically: every file's checksum, then `state.json`, then one rename.

A checkpoint holds DeepSpeed's files of the policy engine, the reference's state, and one file a rank with its random
number generators and the metrics counted since the last row. `state.json` has the progress and settings of the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dsdpo
from dsdpo.atomic import (
    delete_atomically,
    digest_of_file,
    dump_checksummed,
    flush_to_disk,
    load_checksummed,
    partial_path,
    write_json,
)
from dsdpo.distributed import all_or_none, barrier, gather_objects, rank, world_size
from dsdpo.engine.build import device
from dsdpo.engine.quirks.checkpoint_files import TAG, load_engine, save_engine
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CheckpointError
from dsdpo.reference.base import Reference
from dsdpo.training.metrics import Meter

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


def save_checkpoint(
    folder: Path,
    state: TrainState,
    *,
    policy: TrainingEngine,
    reference: Reference,
    meter: Meter,
    record: dict[str, Any],
    keep: Retention,
) -> Path:
    """Write `folder/step-000100`, then delete those that `keep` does not keep. Collective.

    `record` goes into `state.json`. Everything goes to `step-000100.partial`, is flushed to the disk, and gets its name
    by rename after all ranks have finished. DeepSpeed 0.19 would move its own `latest` before that, hence
    `save_latest=False`. Raises `CheckpointError` where the disk fails, and gives back the room that was taken.
    """
    final = checkpoint_path(folder, state.step)
    partial = partial_path(final)
    try:
        _write(partial, state, policy=policy, reference=reference, meter=meter, record=record)
        with all_or_none(), writing(partial):
            if rank() == 0:
                for path in [*partial.rglob("*"), partial]:
                    flush_to_disk(path)
                delete_checkpoint(final)  # of a run that went on from an earlier one
                partial.rename(final)
                flush_to_disk(folder)
                for old in superseded(whole_checkpoints(folder), keep):
                    delete_checkpoint(old)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        barrier()
        raise
    return final


def _write(
    partial: Path,
    state: TrainState,
    *,
    policy: TrainingEngine,
    reference: Reference,
    meter: Meter,
    record: dict[str, Any],
) -> None:
    """Write all files of a checkpoint, `state.json` last. Collective."""
    with all_or_none(), writing(partial):
        if rank() == 0:
            delete_leftovers(partial.parent)
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
            write_json(partial / "identity.json", reference.identity.to_json())
    manifest = checksums(partial)
    with all_or_none(), writing(partial):
        if rank() == 0:
            progress = {**asdict(state), "world_size": world_size(), "dsdpo": dsdpo.__version__, **record}
            (partial / MANIFEST).write_text(dump_checksummed(manifest))
            (partial / STATE).write_text(dump_checksummed(progress))


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Turns the errors of a full or failing disk into `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{partial}: {error}; the checkpoint was not written, earlier ones are intact") from error


def load_checkpoint(path: Path, *, policy: TrainingEngine, reference: Reference, meter: Meter, seed: int) -> TrainState:
    """Restore everything that `save_checkpoint` saved, from a checkpoint without damage. Collective.

    On another number of ranks the sums of metrics are redistributed, and random numbers follow from `seed`, the step
    and the rank.
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
            restore_meter(redistributed_sums(path, progress["world_size"]), meter)
    return TrainState(step=progress["step"], consumed_pairs=progress["consumed_pairs"], means=progress.get("means", {}))


def rank_file(folder: Path, of_rank: int) -> Path:
    """The file of a rank's own state."""
    return folder / f"rank-{of_rank}.safetensors"


def rank_state(meter: Meter) -> dict[str, torch.Tensor]:
    """This rank's random number generators and its sums of metrics since they were last read."""
    state = {f"meter/{name}": sums.cpu() for name, sums in meter.state().items()}
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


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file below `folder`, by its path there; ranks share the reading. Collective."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {}
    with all_or_none():
        for name in names[rank() :: world_size()]:
            try:
                mine[name] = digest_of_file(folder / name)
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
    return {name: digest for part in gather_objects(mine) for name, digest in part.items()}


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank, or None. Collective."""
    wrong, manifest = "", {}
    try:
        read_state(path)
        manifest = load_checksummed((path / MANIFEST).read_text())
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
        content = load_checksummed((path / STATE).read_text())
        return content | {"step": int(content["step"]), "consumed_pairs": int(content["consumed_pairs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read: {error}") from error


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=lambda path: int(path.name[5:]))


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
