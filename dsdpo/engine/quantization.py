"""Models whose linear layers hold 4-bit weights of bitsandbytes: loading them, and telling what their tensors hold."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from dsdpo.config.model import ModelConfig
from dsdpo.engine.optimizer_limits import INSTALL
from dsdpo.errors import ConfigError


def check_installed(model: ModelConfig, *, key: str) -> None:
    """Raise `ConfigError` if the settings ask for what only bitsandbytes does and it is not there."""
    if model.quantization is not None and find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key} needs bitsandbytes, which is not installed: {INSTALL}")


def loading_options(model: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is given to quantize while it loads; nothing for a model in 16 or 32 bits."""
    settings = model.quantization
    if settings is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double,
        bnb_4bit_compute_dtype=getattr(torch, settings.compute_dtype or model.dtype),
        bnb_4bit_quant_storage=getattr(torch, "uint8" if settings.storage_dtype == "uint8" else model.dtype),
    )
    return {"quantization_config": config}


def keep_packed(lm: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew for the CPU at the first pass without gradient.

    bitsandbytes 0.50 does so in place on processors with AVX512-BF16. Training passes would then go through an operator
    that has no backward pass, with gradients that are wrong in silence, and ZeRO-3's shards would hold two layouts.
    """
    module: Any
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(parameter: Any) -> bool:
    """True for packed bits, which mean nothing as numbers of the type that holds them."""
    return getattr(parameter, "quant_state", None) is not None


def meant_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the weight that packed bits stand for."""
    return tuple(parameter.quant_state.shape)


def scales(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors, by name, that give packed bits their size; every rank holds them whole, under ZeRO-3 too."""
    parameter: Any
    for name, parameter in module.named_parameters():
        if is_quantized(parameter):
            state = parameter.quant_state
            yield f"{name}.absmax", state.absmax
            if state.nested:
                yield f"{name}.offset", state.offset
                yield f"{name}.nested_absmax", state.state2.absmax
