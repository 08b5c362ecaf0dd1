"""DeepSpeed's checkpoint files, written so that a rank that cannot write keeps up with the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsdpo.engine.shards import has_frozen
from dsdpo.errors import CheckpointError

TAG = "policy"  # DeepSpeed's name for the folder below the checkpoint


def load_engine(engine: Any, folder: Path) -> None:
    """Take up the state that `save_engine` wrote, by as many ranks under the same ZeRO stage. Collective.

    DeepSpeed's files are pickles, which can run code: only for files whose checksums are known to be ours.
    """
    path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not has_frozen(engine.module))
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it; resume from another")


def save_engine(engine: Any, folder: Path) -> None:
    """Write a training engine's state to `folder`, which holds a folder TAG already. Collective.

    Raises the first OSError of this rank's writing once all ranks are through: DeepSpeed 0.19 waits for all of them at
    the end, and a rank that left on a full disk would leave the others there until the collective times out.
    """
    failures: list[Exception] = []

    def kept(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **options: Any) -> None:
            try:
                write(*arguments, **options)
            except (OSError, RuntimeError) as error:  # torch's zip writer turns the former into the latter
                failures.append(error)

        return attempt

    files = engine.checkpoint_engine
    files.save = kept(files.save)
    engine._copy_recovery_script = kept(engine._copy_recovery_script)
    try:
        # The frozen base of an adapter is on disk already, as the model that training starts from.
        engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=has_frozen(engine.module)
        )
    finally:
        del files.save, engine._copy_recovery_script  # the class's own again
    if failures:
        raise OSError(str(failures[0])) from failures[0]
