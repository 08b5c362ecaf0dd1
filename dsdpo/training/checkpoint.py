"""Checkpoints that exist only when they are whole: `state.json` last, then one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dsdpo
from dsdpo.distributed import all_or_none, barrier, rank, world_size
from dsdpo.engine.saving import TAG, save_engine
from dsdpo.errors import CheckpointError
from dsdpo.reference.base import Reference


@dataclass
class TrainState:
    """All progress of a run: the position in the data follows from one integer."""

    step: int = 0  # optimizer updates done
    consumed_pairs: int = 0  # pairs trained on, over all epochs


def save_checkpoint(folder: Path, state: TrainState, *, policy: Any, reference: Reference, keep_last: int) -> Path:
    """Write `folder/step-000100` with the policy engine's state and the reference's, then prune. Collective.

    Everything goes to `step-000100.partial`, is flushed to the disk, and gets its name by rename after all ranks have
    finished. DeepSpeed 0.19 would move its own `latest` before that, hence `save_latest=False`.
    """
    final = folder / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")
    with all_or_none():
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / TAG).mkdir(parents=True)
    with all_or_none():
        try:
            save_engine(policy, partial)
            reference.save(partial / "reference")
        except OSError as error:
            raise CheckpointError(
                f"{partial}: {error}; the checkpoint was not written, earlier ones are intact"
            ) from error
    barrier()
    with all_or_none():
        if rank() == 0:
            record = {**asdict(state), "world_size": world_size(), "dsdpo": dsdpo.__version__}
            if reference.identity is not None:
                (partial / "identity.json").write_text(json.dumps(reference.identity.to_json(), indent=2) + "\n")
            (partial / "state.json").write_text(json.dumps(record, indent=2) + "\n")
            _flush(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            for old in whole_checkpoints(folder)[:-keep_last]:
                shutil.rmtree(old)
    return final


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / "state.json").exists()), key=lambda path: int(path.name[5:]))


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
