"""Base weights in 4 bits, below an adapter (QLoRA, arXiv 2305.14314) or in a reference; products of one in 8 bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from dsdpo.config.section import Section


def _number(value: object) -> object:
    """A number that the command line gives as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class QuantizationConfig(Section):
    """How linear layers below the output head are quantized: in 4 bits by bitsandbytes while a model loads."""

    bits: Annotated[Literal[4, 8], BeforeValidator(_number)] = 4
    """4: of a weight in memory. 8, for a reference only: weights stay as they are, and each pass multiplies them as
    8-bit floats (e4m3), at twice the rate on Hopper and later; the settings below are not for it."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values: of a normal distribution's quantiles, or of a 4-bit float."""
    double: bool = True
    """Quantize the scales of blocks too: 0.4 bits a weight less."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Precision of the products; null: model.dtype."""
    storage_dtype: Literal["model", "uint8"] = "model"
    """Type of the tensors that hold the packed bits: the model's, which ZeRO-3 shards with all others, or bytes."""

    @model_validator(mode="after")
    def _has_effect(self) -> QuantizationConfig:
        for name, field in type(self).model_fields.items():
            if self.bits == 8 and name != "bits" and getattr(self, name) != field.default:
                raise ValueError(f"{name} has no effect with bits 8, which are e4m3 floats: leave it out")
        return self

    def describe(self) -> str:
        """4-bit nf4, double."""
        if self.bits == 8:
            return "products in 8-bit e4m3"
        return f"{self.bits}-bit {self.type}{', double' if self.double else ''}"
