"""Models whose linear layers hold 4-bit weights of bitsandbytes: loading them, what their tensors hold, their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from dsdpo.config.model import ModelConfig
from dsdpo.config.quantization import QuantizationConfig
from dsdpo.engine.optimizer_limits import INSTALL
from dsdpo.errors import ConfigError


def check_installed(model: ModelConfig, *, key: str) -> None:
    """Raise `ConfigError` if the settings ask for what only bitsandbytes does and it is not there."""
    if model.quantization is not None and model.quantization.bits == 4 and find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key} needs bitsandbytes, which is not installed: {INSTALL}")


def loading_options(model: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is given to quantize while it loads; nothing for a model in 16 or 32 bits."""
    settings = model.quantization
    if settings is None or settings.bits == 8:
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


BLOCK, NESTED_BLOCK = 64, 256  # weights of a scale, and scales of a scale of scales


@dataclass(frozen=True)
class MeantShape:
    """Of a blank model's packed parameter, where a loaded one has bitsandbytes' `QuantState`."""

    shape: tuple[int, ...]


class BlankPackedLinear(nn.Linear):
    """A linear layer on the meta device that takes as much memory as bitsandbytes' with its weights in 4 bits.

    The packed bits are counted in elements of the type that holds them. A pass unpacks the weight for its product, and
    the backward pass once more.
    """

    def __init__(self, linear: nn.Linear, settings: QuantizationConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        dtype = linear.weight.dtype
        numel = linear.weight.numel()
        packed = nn.Parameter(torch.empty(-(-numel // (2 * dtype.itemsize)), dtype=dtype, device="meta"), False)
        packed.quant_state = MeantShape(tuple(linear.weight.shape))  # type: ignore[attr-defined]
        self.weight, self.bias = packed, linear.bias
        self.compute_dtype = getattr(torch, settings.compute_dtype) if settings.compute_dtype else dtype
        scales = -(-numel // BLOCK)
        self.scale_bytes = scales + 4 * -(-scales // NESTED_BLOCK) if settings.double else 4 * scales

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _PackedProduct.apply(input.to(self.compute_dtype), self.weight, meant_shape(self.weight))
        return product.to(input.dtype)


class _PackedProduct(torch.autograd.Function):
    """The product with an unpacked weight, which is not kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = shape
        return input @ input.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad @ grad.new_empty(ctx.shape), None, None


def pack_blank(lm: Any, settings: QuantizationConfig) -> None:
    """Put `BlankPackedLinear` in place of the linear layers of a model on the meta device, but for its output head."""
    head = {id(module) for module in lm.get_output_embeddings().modules()}
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and id(child) not in head:
                setattr(module, name, BlankPackedLinear(child, settings))


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
