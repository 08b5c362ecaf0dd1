"""The run's folder: emptied or taken up again, and what is written into it before training."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dsdpo.atomic import write_json, write_text
from dsdpo.config.load import dump_yaml
from dsdpo.console import say
from dsdpo.disks import Disk, find_disk
from dsdpo.distributed import all_or_none, rank, world_size
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import ConfigError
from dsdpo.run.agreement import installed
from dsdpo.run.plan import Plan
from dsdpo.run.resume import checkpoint_to_resume
from dsdpo.run_folder import RunFolder
from dsdpo.run_lock import RunLock

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "wandb", "dsdpo")


@contextmanager
def opened_folder(plan: Plan) -> Iterator[tuple[RunFolder, Path | None, RunLock]]:
    """The run's folder, which no other run may use meanwhile, the checkpoint to go on from, and the lock. Collective.

    Raises `ConfigError` where a live run has the folder, and what `checkpoint_to_resume` raises.
    """
    folder = RunFolder(plan.run.output_dir)
    lock = RunLock(folder)
    with all_or_none():
        make_folder(folder.path)
    disk = find_disk(folder.path, key="output_dir")
    if not disk.shared:
        say(
            f"output_dir is on {len(disk.sharers)} disks ({disk.describe()}): each keeps its own ranks' part of every "
            "checkpoint, all else is on the first"
        )
    with all_or_none():
        if disk.leads:
            lock.acquire()
    try:
        checkpoint = checkpoint_to_resume(plan)
        make_output_folder(folder, disk, keep=checkpoint is not None, overwrite=plan.run.overwrite_output_dir)
        record_settings(plan, folder)
        yield folder, checkpoint, lock
    finally:
        if disk.leads:
            lock.release()


def make_folder(path: Path) -> None:
    """Make the run's folder. Raises `ConfigError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir: {path} on {socket.gethostname()} cannot be made ({error.strerror}): make room, or choose "
            "another folder"
        ) from error


def make_output_folder(folder: RunFolder, disk: Disk, *, keep: bool, overwrite: bool) -> None:
    """The run's folder, emptied of an earlier run's files unless they are to `keep`. Collective.

    A file that asks to stop is an earlier run's only where the run may `overwrite` that; else it is meant for this one.
    """
    with all_or_none():
        if disk.leads:
            folder.path.mkdir(parents=True, exist_ok=True)
            if keep:
                folder.stopped.unlink(missing_ok=True)  # the run goes on
            else:
                folder.clear(keep=() if overwrite else (folder.stop_file,))


def record_settings(plan: Plan, folder: RunFolder) -> None:
    """Write the resolved settings, both DeepSpeed configs and the environment into the run folder. Collective."""
    with all_or_none():
        if rank() == 0:
            write_text(folder.config, dump_yaml(plan.run))
            write_json(folder.deepspeed, plan.policy_config)
            write_json(folder.environment, environment())
            if plan.reference.own_engine:
                write_json(folder.deepspeed_reference, plan.reference_config)


def environment() -> dict[str, Any]:
    """The command, versions, code and number of ranks of this run."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": world_size(),
        "versions": {name: installed(name) for name in PACKAGES},
        "git_commit": git_commit(Path(__file__).parent),
    }


@cache
def git_commit(folder: Path) -> str | None:
    """The commit that is checked out in `folder`, with "+changes" where files differ from it; None outside of git."""
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "."]):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")


def parameter_counts(policy: TrainingEngine) -> tuple[int, int]:
    """Numbers of the policy's parameters, and of those that are trained."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in policy.module.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trained in counts if trained)
