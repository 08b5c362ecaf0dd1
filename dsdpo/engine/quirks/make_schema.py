"""Write `deepspeed_schema.json`, the keys of the installed DeepSpeed's JSON.

    python -m dsdpo.engine.quirks.make_schema

Two sources. Blocks with a pydantic model have their fields there. The others, the top level among them, are dicts that
DeepSpeed's `DeepSpeedConfig` reads key by key: a dict that remembers what it was asked for, and with which default,
tells their names and kinds. To be run once for a new DeepSpeed; what dsdpo makes of the keys stands in
`deepspeed_keys.py`. A test compares the file with the DeepSpeed that is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import deepspeed
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

from dsdpo.engine.deepspeed_keys import SCHEMA_FILE

Kinds = dict[str, str]
MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "compile": CompileConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
# Read key by key, with the least that DeepSpeed asks of each.
READ: dict[str, dict[str, Any]] = {
    "aio": {},
    "data_types": {},
    "torch_autocast": {"dtype": "bfloat16"},
    "optimizer": {"type": "Adam", "params": {}},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "checkpoint": {},
    "activation_checkpointing": {},
    "flops_profiler": {},
}


def make_schema() -> dict[str, Any]:
    """What the installed DeepSpeed takes: kinds of keys by block, allowed values, old names, optimizers, schedules."""
    blocks: dict[str, Kinds] = {"": _read("", {}), "timers": {"throughput": "block"}}
    choices: dict[str, list[Any]] = {}
    old: list[str] = []
    models = MODELS | {name: _model_in(field.annotation) for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    for name, model in models.items():
        for path, kinds, allowed, deprecated in _blocks_of(name, model):
            blocks[path] = kinds
            choices |= allowed
            old += deprecated
    for name, least in READ.items():
        blocks[name] = _read(name, least)
    blocks[""] |= {name: "block" for name in blocks if name and "." not in name}
    return {
        "deepspeed": deepspeed.__version__.split("+")[0],
        "blocks": {name: dict(sorted(kinds.items())) for name, kinds in sorted(blocks.items())},
        "choices": dict(sorted(choices.items())),
        "old_names": sorted(old),
        "optimizers": sorted(DEEPSPEED_OPTIMIZERS),
        "schedulers": sorted(VALID_LR_SCHEDULES),
    }


def _blocks_of(path: str, model: type[BaseModel]) -> Iterator[tuple[str, Kinds, dict[str, list[Any]], list[str]]]:
    """A pydantic block and those inside it: its path, kinds, allowed values and names that are still taken."""
    kinds: Kinds = {}
    choices: dict[str, list[Any]] = {}
    old: list[str] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            old.append(f"{path}.{name}")
            continue
        if key != name:
            old.append(f"{path}.{name}")
        inner = _model_in(field.annotation)
        kinds[key] = "block" if inner else _kind_of(field.annotation)
        if allowed := _choices_of(field.annotation):
            choices[f"{path}.{key}"] = allowed
        if inner:
            yield from _blocks_of(f"{path}.{key}", inner)
    yield path, kinds, choices, old


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, None left out."""
    parts = get_args(annotation) if get_origin(annotation) not in (list, dict, Literal, None) else (annotation,)
    return [part for part in parts if part is not type(None)]


def _model_in(annotation: Any) -> Any:
    return next((p for p in _parts(annotation) if isinstance(p, type) and issubclass(p, BaseModel)), None)


def _choices_of(annotation: Any) -> list[Any]:
    kinds = _parts(annotation)
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Enum):
        # An alias such as ZeroStageEnum.max_stage is no value of its own.
        return [member.value for member in kinds[0]]
    return list(get_args(kinds[0])) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else []


def _kind_of(annotation: Any) -> str:
    """The one word that `deepspeed_keys.KINDS` has for an annotation, "any" where several would do."""
    kinds = set()
    for part in _parts(annotation):
        if get_origin(part) is list or part is list:
            kinds.add("list")
        elif get_origin(part) is Literal:
            kinds.add("text" if all(isinstance(value, str) for value in get_args(part)) else "any")
        elif isinstance(part, type) and issubclass(part, Enum):
            kinds.add("count" if issubclass(part, int) else "text")
        else:
            kinds.add({bool: "flag", int: "count", float: "number", str: "text", Path: "text"}.get(part, "any"))
    return kinds.pop() if len(kinds) == 1 else "any"


def _read(name: str, least: dict[str, Any]) -> Kinds:
    """Keys that DeepSpeed asks a block for, with the kinds of the defaults it gives; "any" where there is none."""
    recorder = _Recorder({"train_micro_batch_size_per_gpu": 1} if not name else least)
    DeepSpeedConfig(recorder if not name else {"train_micro_batch_size_per_gpu": 1, name: recorder})
    kinds: Kinds = {}
    for key, default in recorder.asked.items():
        kind = _kind_of(type(default))
        kinds[key] = "block" if isinstance(default, dict) else "any" if default is None else kind
    return kinds


class _Recorder(dict[str, Any]):
    """A dict that remembers which keys were asked for, and the defaults."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        if self.asked.get(key) is None:
            self.asked[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Recorder:
        return self


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(make_schema(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {SCHEMA_FILE}")
