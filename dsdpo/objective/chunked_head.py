"""An output head that gives log-probs of targets, without ever holding a (tokens, vocabulary) matrix or its gradient.

Shapes: N tokens, H hidden size, V vocabulary. Logits of one chunk of tokens live at a time, in the forward pass and,
recomputed, in the backward pass. Under 16-bit weights the gradient's float32 sums cover a block of the vocabulary at a
time: of all of it they would be 4·V·H bytes, 2 GiB for Llama 3 8B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsdpo.objective.output_head import LogitTransform

# Of float32 logits alive at once: large products suit a GPU, and what fits its caches suits a CPU, which takes no more
# time for 16 MiB than for 256 and a fifth less where memory comes fresh from the system.
CHUNK_BYTES, CHUNK_BYTES_ON_CPU = 256 * 2**20, 16 * 2**20
SUM_BYTES = 256 * 2**20  # of the gradient's float32 sums alive at once


class ChunkedHead(nn.Linear):
    """An output head that can return log-probs of given targets; without targets it is the `nn.Linear` it was."""

    transform: LogitTransform
    kernels: Any = None  # fused_head, whose kernels take the place of products in chunks
    only_at: Tensor | None = None  # (N,) flat positions; set for passes that need the logits of no others

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        chunk: int | None = None,
        extras: tuple[str, ...] = (),
    ) -> Tensor:
        """Log-prob (N,) float32 of `targets` (N,) after `hidden` (N, H), in chunks of `chunk` tokens.

        With `extras`, a row for each after it, (1 + E, N), whose gradient is not taken: "alignment", the log-prob less
        log Σ_v p(v)² (WPO); "entropy" of the distribution over the vocabulary, nats.
        """
        if targets is None:
            if self.only_at is not None:
                hidden = hidden.flatten(0, 1).index_select(0, self.only_at)[None]
            return super().forward(hidden)
        live = CHUNK_BYTES_ON_CPU if hidden.device.type == "cpu" else CHUNK_BYTES
        chunk = chunk or max(1, live // (4 * self.out_features))
        transform = self.transform
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if transform.hidden_scale != 1.0:
            hidden = hidden * transform.hidden_scale
        if transform.vocabulary is not None:
            weight, bias = weight[: transform.vocabulary], None if bias is None else bias[: transform.vocabulary]
        return _ChunkedLogp.apply(hidden, weight, bias, targets, transform, chunk, extras, self.kernels)


class _ChunkedLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
        extras: tuple[str, ...],
        kernels: Any = None,
    ) -> Tensor:
        if kernels is None:
            rows, normalizer = _in_chunks(hidden, weight, bias, targets, transform, chunk, extras)
        else:
            found, normalizer = kernels.fused_logps(hidden, weight, bias, targets, transform, extras=bool(extras))
            rows = torch.stack([found[name] for name in ("logps", *extras)])
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.transform, ctx.chunk, ctx.kernels = transform, chunk, kernels
        device = hidden.device.type
        if device != "meta":  # which has no autocast: see estimate/activations.py
            ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return rows if extras else rows[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad.is_meta:
            return _ChunkedLogp._backward(ctx, grad)
        # Logits must be made again as they were, and autograd runs a backward outside of autocast.
        enabled, dtype = ctx.autocast
        with torch.autocast(grad.device.type, dtype=dtype, enabled=enabled):
            return _ChunkedLogp._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        grad = grad if grad.dim() == 1 else grad[0]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        blocks = _vocabulary_blocks(weight) if need_weight else [slice(0, len(weight))]
        # Sums over chunks and blocks stay in float32: adding products in bfloat16 drifts with their number.
        grad_hidden = None
        if need_hidden:
            grad_hidden = torch.zeros_like(hidden, dtype=torch.float32 if len(blocks) > 1 else hidden.dtype)
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        gradient = _gradient if ctx.kernels is None else ctx.kernels.fused_gradient
        for block in blocks:
            rows, own_bias = weight[block], None if bias is None else bias[block]
            summed = None if grad_weight is None else grad_weight[block]
            if summed is not None and weight.dtype != torch.float32:
                summed = torch.zeros_like(rows, dtype=torch.float32)
            for at in _slices(len(hidden), ctx.chunk * (len(weight) // len(rows))):
                places = targets[at] - block.start
                delta = gradient(hidden[at], rows, own_bias, places, normalizer[at], grad[at], ctx.transform)
                if grad_bias is not None:
                    grad_bias[block] += delta.sum(0, dtype=torch.float32)
                delta = delta.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[at] += delta @ rows
                if summed is not None:
                    summed += delta.t() @ hidden[at]
            if grad_weight is not None and summed is not None and weight.dtype != torch.float32:
                grad_weight[block] = summed
        return (
            grad_hidden.to(hidden.dtype) if grad_hidden is not None else None,
            grad_weight,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
            None,
            None,
            None,
        )


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    chunk: int,
    extras: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """Log-probs of targets with a row for each of extras, (1 + E, N), and their normalizers (N,), float32."""
    rows = torch.empty(1 + len(extras), len(hidden), dtype=torch.float32, device=hidden.device)
    logps = rows[0]
    normalizer = torch.empty_like(logps)
    for at in _slices(len(hidden), chunk):
        logits = _logits(hidden[at], weight, bias, transform)
        normalizer[at] = logits.logsumexp(-1)
        logps[at] = logits.gather(-1, targets[at, None]).squeeze(-1) - normalizer[at]
        for row, name in enumerate(extras, start=1):
            rows[row, at] = _extra(name, logits, logps[at], normalizer[at])
    return rows, normalizer


def _gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    transform: LogitTransform,
) -> Tensor:
    """Gradient (n, v) float32 of a chunk's product with a block of the vocabulary, given that of its log-probs, (n,);
    `places` (n,) are its targets within the block, or outside."""
    logits = _logits(hidden, weight, bias, transform)
    delta = torch.exp(logits - normalizer[:, None]).mul_(-grad[:, None])
    inside = (places >= 0) & (places < len(weight))
    own = torch.where(inside, grad, 0.0)[:, None]
    delta.scatter_add_(-1, places.clamp(0, len(weight) - 1)[:, None], own)
    return transform.backward(delta, logits)


def _vocabulary_blocks(weight: Tensor) -> list[slice]:
    """Of a weight (V, H), the rows whose gradient is summed at a time: all where it is float32 in any case."""
    if weight.dtype == torch.float32:
        return [slice(0, len(weight))]
    return _slices(len(weight), max(1, SUM_BYTES // (4 * weight.shape[1])))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    return transform(logits.float())


def _extra(name: str, logits: Tensor, logps: Tensor, normalizer: Tensor) -> Tensor:
    """(n,) of `ChunkedHead`'s extras for the logits (n, V) of a chunk."""
    if name == "alignment":
        return logps - ((2.0 * logits).logsumexp(-1) - 2.0 * normalizer)
    return normalizer - (torch.exp(logits - normalizer[:, None]) * logits).sum(-1)


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
