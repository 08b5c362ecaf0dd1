"""DeepSpeed's own word on a config before any model loads: its config objects, and an engine around a toy.

What DeepSpeed refuses, it refuses in many places: its config classes, the engine's and the optimizers' constructors,
the first reduction. A toy of a few hundred parameters meets them all in a fraction of a second.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from dsdpo.distributed import all_or_none, gather_objects
from dsdpo.engine.deepspeed_keys import OPTIMIZERS, Config, lookup
from dsdpo.engine.quirks.destroy import destroy_engine
from dsdpo.engine.zero_config import offload_device
from dsdpo.engine.zero_limits import package_problems
from dsdpo.errors import ConfigError

WIDTH = 16
LARGEST_BUCKET = 1_000_000  # elements; the toy needs no more
# Of no concern to the toy: they write files, print pages or want what only the real engine has.
LEFT_OUT = (
    "tensorboard", "csv_monitor", "wandb", "comet", "comms_logger", "flops_profiler", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "aio", "activation_checkpointing", "compile",
)  # fmt: skip
_accepted: set[str] = set()  # configs, as JSON, that DeepSpeed has taken in this process
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")


def check_with_deepspeed(config: Config, *, source: str, trains: bool) -> None:
    """Raise `ConfigError` for a resolved config that DeepSpeed refuses, naming the key that it is about. Collective."""
    with all_or_none():
        for missing in package_problems(config):
            raise ConfigError(f"{source}: {missing}")
        _check_swap_folders(config, source)
    key = json.dumps([config, trains], sort_keys=True)
    if all(gather_objects(key in _accepted)):
        return
    toy = _toy_config(config)
    for attempt, tried in (
        (_build_config, config),
        (_make_optimizer, config),
        (_train_toy if trains else _ask_toy, toy),
    ):
        if problem := _refusal(attempt, tried):
            raise ConfigError(_message(problem, _culprit(attempt, tried, problem), config, source))
    _accepted.add(key)


def _check_swap_folders(config: Config, source: str) -> None:
    for what in ("param", "optimizer"):
        key = f"zero_optimization.offload_{what}.nvme_path"
        if offload_device(config, "param" if what == "param" else "optimizer") != "nvme":
            continue
        folder = Path(str(lookup(config, key)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(
                f"{source}: {key} {folder} cannot be written ({error.strerror}); name a folder on an NVMe disk"
            ) from error


def _message(problem: str, key: str | None, config: Config, source: str) -> str:
    what = "this config" if key is None else f"{key} {json.dumps(lookup(config, key))}"
    return f"{source}: DeepSpeed {version('deepspeed')} refuses {what}: {problem}; change or delete it"


def _refusal(attempt: Callable[[Config], None], config: Config) -> str | None:
    """What DeepSpeed says against a config in one line, on any rank; None if it takes it. Collective."""
    problem = None
    try:
        with _quiet():
            attempt(copy.deepcopy(config))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if type(error).__name__ == "ValidationError":  # pydantic's: a head, then key and reason by turns
            lines = [f"{lines[1]}: {lines[2].split(' [')[0]}"] if len(lines) > 2 else lines
        problem = f"{type(error).__name__}: {lines[0][:300] if lines else 'without a word'}"
    return next((said for said in gather_objects(problem) if said is not None), None)


def _culprit(attempt: Callable[[Config], None], config: Config, said: str) -> str | None:
    """The first key without which DeepSpeed takes the config, or says something else. Collective."""
    for key in sorted(_keys(config), key=lambda key: key.endswith(".type")):
        without = copy.deepcopy(config)
        *blocks, last = key.split(".")
        inner = without
        for name in blocks:
            inner = inner[name]
        del inner[last]
        if _refusal(attempt, without) != said:
            return key
    return None


def _keys(block: Config, path: str = "") -> Iterator[str]:
    """Dotted keys, innermost first; what dsdpo itself wrote for its books is left out."""
    for key, value in block.items():
        name = f"{path}.{key}".removeprefix(".")
        if isinstance(value, dict):
            yield from _keys(value, name)
        elif not name.startswith("train_") and name not in ("gradient_accumulation_steps", "zero_optimization.stage"):
            yield name


def _build_config(config: Config) -> None:
    DeepSpeedConfig(config)


def _make_optimizer(config: Config) -> None:
    """Ask the class of an optimizer block that the toy goes without, since making one compiles an operator first."""
    kind = str(lookup(config, "optimizer.type")).lower()
    params = dict(lookup(config, "optimizer.params") or {})
    if kind not in OPTIMIZERS or kind.startswith("mu") or params.pop("torch_adam", False):
        return
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    on_cpu = offload_device(config, "optimizer") != "none"
    classes: dict[str, tuple[Any, Any]] = {
        "lamb": (FusedLamb, FusedLamb),
        "lion": (FusedLion, DeepSpeedCPULion),
        "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
    }
    for name in ("adam_w_mode", "fp32_optimizer_states"):  # which DeepSpeed takes for itself
        params.pop(name, None)
    inspect.signature(classes.get(kind, (FusedAdam, DeepSpeedCPUAdam))[on_cpu]).bind([], **params)


def _toy_config(config: Config) -> Config:
    """The config for a toy: the same numerics and stages, no files, disks, groups of nodes or compiled operators."""
    toy = {key: copy.deepcopy(value) for key, value in config.items() if key not in LEFT_OUT}
    zero = toy.get("zero_optimization", {})
    zero.pop("zero_hpz_partition_size", None)  # whose groups DeepSpeed can make once in a process
    zero |= {key: min(zero[key], LARGEST_BUCKET) for key in BUCKETS if key in zero}
    for what in ("offload_param", "offload_optimizer"):
        if zero.get(what, {}).get("device") == "nvme":
            zero[what] = {"device": "cpu", "pin_memory": zero[what].get("pin_memory", False)}
    kind = str(lookup(toy, "optimizer.type")).lower()
    torchs = lookup(toy, "optimizer.params.torch_adam") and kind != "muon"
    if kind == "adamw_8bit" or (kind in OPTIMIZERS and not torchs):
        toy.pop("optimizer")
    if offload_device(config, "optimizer") != "none":
        # Which then want DeepSpeed's CPU Adam, an operator to compile.
        for name in ("bf16", "fp16"):
            toy[name] = {key: value for key, value in toy.get(name, {}).items() if not key.startswith(f"{name}_")}
    toy["zero_force_ds_cpu_optimizer"] = False
    toy["zero_allow_untested_optimizer"] = True
    return toy


def _train_toy(config: Config) -> None:
    toy = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
    optimizer = None if "optimizer" in config else torch.optim.AdamW(toy.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(
        model=toy, model_parameters=list(toy.parameters()), optimizer=optimizer, config=config
    )
    try:
        engine.backward(engine(_input(engine)).float().sum(), scale_wrt_gas=False)
        engine.step()
    finally:
        destroy_engine(engine)


def _ask_toy(config: Config) -> None:
    toy = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)).requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=toy, config=config)
    try:
        with torch.no_grad():
            engine(_input(engine))
    finally:
        destroy_engine(engine)


def _input(engine: DeepSpeedEngine) -> torch.Tensor:
    dtype = next(engine.module.parameters()).dtype
    return torch.ones(2, WIDTH, dtype=dtype, device=get_accelerator().current_device_name())


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which DeepSpeed says nothing and draws no random numbers that a run would miss."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with torch.random.fork_rng(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
