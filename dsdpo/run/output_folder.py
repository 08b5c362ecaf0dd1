"""The run's folder: emptied or taken up again, and what is written into it before training."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

from dsdpo.config.load import dump_yaml
from dsdpo.distributed import all_or_none, rank, world_size
from dsdpo.run.plan import Plan
from dsdpo.run_folder import RunFolder, write_json, write_text

PACKAGES = ("deepspeed", "transformers", "peft", "datasets", "dsdpo")


def make_output_folder(folder: RunFolder, *, keep: bool, overwrite: bool) -> None:
    """The run's folder, emptied of an earlier run's files unless they are to `keep`. Collective.

    A file that asks to stop is an earlier run's only where the run may `overwrite` that; else it is meant for this one.
    """
    with all_or_none():
        if rank() == 0:
            folder.path.mkdir(parents=True, exist_ok=True)
            if keep:
                folder.stopped.unlink(missing_ok=True)  # the run goes on
            else:
                folder.clear(keep=() if overwrite else (folder.stop_file,))


def record_settings(plan: Plan, folder: RunFolder) -> None:
    """Write the resolved settings, both DeepSpeed configs and the environment into the run folder. Collective."""
    environment: dict[str, Any] = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": world_size(),
        "versions": {"torch": torch.__version__} | {name: version(name) for name in PACKAGES},  # with its CUDA build
    }
    with all_or_none():
        if rank() == 0:
            write_text(folder.config, dump_yaml(plan.run))
            write_json(folder.deepspeed, plan.policy_config)
            write_json(folder.environment, environment)
            if plan.reference.own_engine:
                write_json(folder.deepspeed_reference, plan.reference_config)
