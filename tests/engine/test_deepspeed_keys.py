"""Our list of DeepSpeed's keys against the installed DeepSpeed: an upgrade that changes them fails here."""

from enum import Enum
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from dsdpo.engine import deepspeed_keys


def test_top_level_keys():
    read = Recorder({"train_micro_batch_size_per_gpu": 1})
    deepspeed_config(read)
    ours = {*deepspeed_keys.BLOCKS[""], *(key for key in deepspeed_keys.REMOVED if "." not in key), "bfloat16"}
    # DeepSpeed reads it only once the ranks are connected.
    assert read.keys_read | {"sequence_parallel_size"} == ours


@pytest.mark.parametrize(
    "name",
    ["aio", "data_types", "torch_autocast", "optimizer", "scheduler", "checkpoint", "activation_checkpointing"],
)
def test_blocks_read_key_by_key(name):
    values = {"optimizer": {"type": "Adam", "params": {}}, "scheduler": {"type": "WarmupLR", "params": {}}}
    block = Recorder(values.get(name, {"dtype": "bfloat16"} if name == "torch_autocast" else {}))
    deepspeed_config({"train_micro_batch_size_per_gpu": 1, name: block})
    assert block.keys_read == set(deepspeed_keys.BLOCKS[name])


@pytest.mark.parametrize(
    "name",
    ["zero_optimization", "zero_optimization.offload_param", "zero_optimization.offload_optimizer", "bf16", "fp16"],
)
def test_blocks_with_a_schema(name):
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    current = {
        field.alias or key: kind_of(field.annotation)
        for key, field in models[name].model_fields.items()
        if not (field.json_schema_extra or {}).get("deprecated")
    }
    assert current == deepspeed_keys.BLOCKS[name]
    accepted = {key for key, field in models[name].model_fields.items()} | set(current)
    renamed = {key.rsplit(".", 1)[1] for key in deepspeed_keys.RENAMED if key.startswith(f"{name}.")}
    assert accepted - set(current) == renamed


def test_types():
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    assert set(deepspeed_keys.OPTIMIZERS) == set(DEEPSPEED_OPTIMIZERS)
    assert set(deepspeed_keys.SCHEDULES) == set(VALID_LR_SCHEDULES)


class Recorder(dict):
    """A dict that remembers which keys were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.keys_read = set()

    def get(self, key, default=None):
        self.keys_read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.keys_read.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def deepspeed_config(config):
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(config)


def kind_of(annotation):
    """Our name for a DeepSpeed annotation."""
    kinds = [part for part in (get_args(annotation) or (annotation,)) if part is not type(None)]
    kind = kinds[0]
    if issubclass(kind, BaseModel):
        return "block"
    if issubclass(kind, Enum):
        return "count" if issubclass(kind, int) else "text"
    return {bool: "flag", int: "count", float: "number", str: "text", Path: "text"}[kind]
