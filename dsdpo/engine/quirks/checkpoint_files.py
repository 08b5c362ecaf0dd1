"""DeepSpeed's checkpoint files: written so that a rank that cannot write keeps up, read by however many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.optim.lr_scheduler import LambdaLR

from dsdpo.engine.quirks.put_off import HostCopies, Write, put_off
from dsdpo.engine.quirks.repartition import load_cut_anew, same_layout
from dsdpo.engine.shards import has_frozen
from dsdpo.errors import CheckpointError

TAG = "policy"  # DeepSpeed's name for the folder below the checkpoint


def load_engine(engine: DeepSpeedEngine, folder: Path) -> None:
    """Take up the state that `save_engine` wrote, by any number of ranks under any ZeRO stage. Collective.

    Bit for bit where nothing has changed, which DeepSpeed loads itself. DeepSpeed's files are pickles, which can run
    code: only for files whose checksums are known to be ours.
    """
    with own_hyperparameters(engine):
        if same_layout(engine, folder / TAG):
            path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not has_frozen(engine.module))
            if path is None:
                raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it; resume from another")
        else:
            load_cut_anew(engine, folder / TAG)
    count_through(engine.optimizer.optimizer)


@contextmanager
def own_hyperparameters(engine: DeepSpeedEngine) -> Iterator[None]:
    """A block after which the engine has the optimizer settings it came with, not those saved with the state it loads.

    They are the same unless the user asked for others. A schedule goes on from the loaded step, at the engine's rates.
    """
    names = ("betas", "eps", "weight_decay", "momentum", "nesterov", "initial_lr")
    kept = [{name: group[name] for name in names if name in group} for group in engine.optimizer.param_groups]
    schedule = engine.lr_scheduler
    rates = list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else []
    yield
    groups = engine.optimizer.param_groups
    for group, own in zip(groups, kept, strict=True):
        group.update(own)
    if rates:
        schedule.base_lrs = rates
        schedule._last_lr = [
            rate * at(schedule.last_epoch) for rate, at in zip(rates, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(groups, schedule._last_lr, strict=True):
            group["lr"] = rate


def count_through(optimizer: torch.optim.Optimizer) -> None:
    """Replay the step count of DeepSpeed's CPU Adam, so that its bias correction is that of a run without a resume.

    It multiplies the powers of beta up in float32, update by update, but after a gap takes them by pow, which rounds
    otherwise (DeepSpeed 0.19, csrc/includes/cpu_adam.h, IncrementStep). So the updates until now are counted through
    on one element of a scratch tensor: some microseconds each.
    """
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    group = optimizer.param_groups[0]
    hyperparameters = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
    element = [torch.zeros(1) for _ in range(4)]  # weight, gradient, both moments
    for step in range(1, 1 + max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, *hyperparameters, *element)


def save_engine(engine: DeepSpeedEngine, folder: Path, copies: HostCopies | None = None) -> list[Write]:
    """Write a training engine's state to `folder`, which holds a folder TAG already. Collective.

    With `copies` the large files are not written yet, but copied there: what writes them is returned, for any thread.

    Raises the first OSError of this rank's writing once all ranks are through: DeepSpeed 0.19 waits for all of them at
    the end, and a rank that left on a full disk would leave the others there until the collective times out.
    """
    failures: list[Exception] = []
    later: list[Write] = []

    def kept(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **options: Any) -> None:
            try:
                write(*arguments, **options)
            except (OSError, RuntimeError) as error:  # torch's zip writer turns the former into the latter
                failures.append(error)

        return attempt

    def copy(state_dict: Any, path: str) -> None:
        assert copies is not None
        later.append(put_off(state_dict, path, copies))

    files = engine.checkpoint_engine
    files.save = kept(files.save if copies is None else copy)
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
    return later
