"""An adapter merged into its base model, as a model folder, weight by weight and piece by piece."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from dsdpo.config.lora import LoraConfig
from dsdpo.config.model import ModelConfig
from dsdpo.engine.adapter_folder import ADAPTER_WEIGHTS
from dsdpo.engine.blank import blank_lm, key_mapping
from dsdpo.engine.download import local_folder
from dsdpo.engine.lora import POLICY, merged_model, with_settings_of
from dsdpo.engine.streamed import MEMORY_BYTES, SHARD_BYTES, Streamed, WeightFiles, write_streamed
from dsdpo.engine.weight_files import safetensors_shapes

PLAIN = ("lora_A.weight", "lora_B.weight")


def write_merged(
    model: ModelConfig,
    adapter: Path,
    folder: Path,
    *,
    dtype: torch.dtype,
    memory_bytes: int = MEMORY_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> bool:
    """Write `model` with the adapter in a folder merged into it to `folder`; whether it was streamed.

    Each weight is base + scaling · B A in float32, rounded once to `dtype`, with no more than `memory_bytes` held at a
    time. Adapters that are more than such products (DoRA, modules_to_save, trained biases, embeddings), and models
    whose files name weights otherwise than their modules, are merged by peft, whole in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = local_folder(model)
    with torch.device("meta"):
        lm = with_settings_of(blank_lm(model), model.model_copy(update={"lora": LoraConfig(path=str(adapter))}))
    files = WeightFiles.of(base) if any(base.glob("*.safetensors")) and key_mapping(model) is None else None
    factors = None if files is None else _plain_factors(lm, adapter, files)
    if files is None or factors is None:
        merged_model(model, adapter).to(dtype).save_pretrained(folder)
        return False
    tensors = list(_merged_tensors(files, WeightFiles(adapter / ADAPTER_WEIGHTS), factors, dtype))
    write_streamed(folder, tensors, memory_bytes=memory_bytes, shard_bytes=shard_bytes)
    write_settings(model, folder, dtype=dtype)
    return True


def _plain_factors(lm: peft.PeftModel, adapter: Path, files: WeightFiles) -> dict[str, tuple[str, float]] | None:
    """By weight of the base: the adapter's name of its layer and its scaling; None if the adapter is more than that."""
    stored = safetensors_shapes(adapter / ADAPTER_WEIGHTS, key="the adapter")
    if not all(name.endswith(PLAIN) for name in stored):
        return None
    factors = {}
    for name, layer in lm.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, Linear) or layer.fan_in_fan_out or layer.use_dora.get(POLICY) or layer.lora_variant:
            return None
        weight = name.removeprefix("base_model.model.") + ".weight"
        if weight not in files or files.shape(weight) != (layer.out_features, layer.in_features):
            return None
        factors[weight] = name, float(layer.scaling[POLICY])
    expected = {f"{name}.{part}" for name, _ in factors.values() for part in PLAIN}
    return factors if expected == stored.keys() else None


def _merged_tensors(
    base: WeightFiles, adapter: WeightFiles, factors: dict[str, tuple[str, float]], dtype: torch.dtype
) -> Iterator[Streamed]:
    for name in base.names():
        stays = not base.dtype(name).is_floating_point
        shape = base.shape(name)
        read = _merging(base, adapter, name, *factors[name]) if name in factors else _reading(base, name)
        yield Streamed(name, shape, base.dtype(name) if stays else dtype, read)


def _reading(files: WeightFiles, name: str) -> Any:
    return lambda first, count: files.read(name, first, count)


def _merging(base: WeightFiles, adapter: WeightFiles, weight: str, layer: str, scaling: float) -> Any:
    """Reads stretches of a merged weight (out, in): only the rows of B that it lies in, and A whole."""
    width = base.shape(weight)[1]
    rank = adapter.shape(f"{layer}.{PLAIN[0]}")[0]

    def read(first: int, count: int) -> Tensor:
        top, bottom = first // width, -(-(first + count) // width)
        factor_a = adapter.whole(f"{layer}.{PLAIN[0]}").float()
        factor_b = adapter.read(f"{layer}.{PLAIN[1]}", top * rank, (bottom - top) * rank).view(-1, rank).float()
        added = (factor_b @ factor_a).mul_(scaling).view(-1)[first - top * width :][:count]
        return base.read(weight, first, count).float().add_(added)

    return read


def write_settings(model: ModelConfig, folder: Path, *, dtype: torch.dtype) -> None:
    """config.json, generation_config.json and the model's own code, as in the folder that it comes from."""
    source = local_folder(model)
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    config.dtype = dtype
    config.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
    if model.trust_remote_code:
        for path in source.glob("*.py"):
            shutil.copy(path, folder)
