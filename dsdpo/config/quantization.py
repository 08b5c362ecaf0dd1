"""Base weights in 4 bits, below an adapter (QLoRA, arXiv 2305.14314) or in a reference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from dsdpo.config.section import Section


def _number(value: object) -> object:
    """A number that the command line gives as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class QuantizationConfig(Section):
    """How linear layers below the output head are quantized by bitsandbytes while a model loads."""

    bits: Annotated[Literal[4], BeforeValidator(_number)] = 4
    """Bits of a weight."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values: of a normal distribution's quantiles, or of a 4-bit float."""
    double: bool = True
    """Quantize the scales of blocks too: 0.4 bits a weight less."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Precision of the products; null: model.dtype."""
    storage_dtype: Literal["model", "uint8"] = "model"
    """Type of the tensors that hold the packed bits: the model's, which ZeRO-3 shards with all others, or bytes."""

    def describe(self) -> str:
        """4-bit nf4, double."""
        return f"{self.bits}-bit {self.type}{', double' if self.double else ''}"
