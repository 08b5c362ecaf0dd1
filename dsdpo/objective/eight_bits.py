"""Linear layers whose products are made of 8-bit floats (e4m3), for a model that answers and does not train.

Weights stay in the type that they are held, sharded and gathered in. Each pass rounds them, and what they meet, to e4m3
under a scale for each row: for each output, and for each token. GPUs from compute capability 9.0 (Hopper) on multiply
those numbers at twice the rate of 16 bits; elsewhere float32 does it, which tells the same bias at no gain.
Source of the format: Micikevicius et al. 2022 (arXiv 2209.05433).

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsdpo.errors import ConfigError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3's numbers
ROUTERS = ("gate", "router")  # of experts: a token dealt to others is more than rounding


class Fp8Linear(nn.Linear):
    """A linear layer that rounds inputs and weight to e4m3; its bias and its result are not."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., O) of (..., I)."""
        rows, row_scales = rounded(hidden.reshape(-1, hidden.shape[-1]))
        weight, weight_scales = rounded(self.weight)
        product = multiplied(rows, row_scales, weight, weight_scales).to(hidden.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*hidden.shape[:-1], self.out_features)


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (R, I) in e4m3, the largest of each being 448, and the float32 scales (R, 1) to multiply them with."""
    scales = matrix.abs().amax(-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (matrix / scales).clamp(-LARGEST, LARGEST).to(E4M3), scales


def multiplied(rows: Tensor, row_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """(N, O): rows (N, I) times weight (O, I), both as `rounded` gives them."""
    if _has_products(rows.device) and rows.shape[1] % 16 == 0 and len(weight) % 16 == 0 and len(rows):
        return torch._scaled_mm(
            rows, weight.t(), scale_a=row_scales, scale_b=weight_scales.t(), out_dtype=torch.bfloat16
        )
    return (rows.float() @ weight.float().t()) * row_scales * weight_scales.t()


def _has_products(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def multiply_in_fp8(lm: Any) -> None:
    """Have a model's linear layers below its head multiply in e4m3. Raises `ConfigError` where it has none."""
    head = lm.get_output_embeddings()
    linears = [
        module
        for name, module in lm.named_modules()
        if type(module) is nn.Linear and module is not head and name.split(".")[-1] not in ROUTERS
    ]
    if not linears:
        raise ConfigError(f"reference.quantization: {type(lm).__name__} has no linear layers below its head")
    for linear in linears:
        linear.__class__ = Fp8Linear
