"""Triton kernels for `ChunkedHead`: log-probs from hidden states and the head's weight without logits in memory.

The forward kernel multiplies a tile of tokens with tiles of the vocabulary and keeps, of each token, running sums over
the vocabulary. The backward kernel makes the same tiles again and writes the gradient of the logits, in the weight's
type, for as many tokens and as much of the vocabulary as its caller wants at a time; the two products with that are
torch's. Logits are float32 throughout, which a linear layer in 16 bits rounds. Nothing is added up in an order of
chance. Needs a GPU, or TRITON_INTERPRET=1, under which Triton computes on the CPU, slowly.

Shapes: N tokens, H hidden size, V vocabulary, S parts of it that programs take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsdpo.objective.output_head import LogitTransform

TOKENS, VOCABULARY, DEPTH = 64, 128, 64  # of a tile: rows, columns, and how far the product goes at a time
PROGRAMS = 512  # that the forward pass starts at least, where the vocabulary has so many tiles


@triton.jit
def _tile(hidden, weight, bias, rows, columns, tokens, vocabulary, width, scale, cap, has_bias: tl.constexpr,
          has_cap: tl.constexpr, depth_block: tl.constexpr, widened: tl.constexpr):  # fmt: skip
    """Logits float32 (rows, columns), as the model changes them after its head."""
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    logits = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, width, depth_block):
        depth = start + tl.arange(0, depth_block)
        left = tl.load(
            hidden + wide_rows[:, None] * width + depth[None, :],
            mask=(rows < tokens)[:, None] & (depth < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + wide_columns[None, :] * width + depth[:, None],
            mask=(columns < vocabulary)[None, :] & (depth < width)[:, None],
            other=0.0,
        )
        if widened:
            left, right = left.to(tl.float32), right.to(tl.float32)
        logits = tl.dot(left, right, logits, input_precision="ieee")
    if has_bias:
        logits += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if has_cap:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), which overflows to its limits
        logits = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / cap)))
    return logits


@triton.jit
def _sums(hidden, weight, bias, targets, out, tokens, vocabulary, width, part, scale, cap, has_bias: tl.constexpr,
          has_cap: tl.constexpr, with_extras: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr,
          depth_block: tl.constexpr, widened: tl.constexpr):  # fmt: skip
    """One part of the vocabulary: out (5, S, N) gets maximum, Σe, Σe·logit, Σe² with e = exp(logit - maximum), and the
    target's logit, 0 where another part has the target."""
    rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    own = tl.load(targets + rows, mask=rows < tokens, other=-1)
    largest = tl.full((row_block,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((row_block,), dtype=tl.float32)
    weighted = tl.zeros((row_block,), dtype=tl.float32)
    squares = tl.zeros((row_block,), dtype=tl.float32)
    chosen = tl.zeros((row_block,), dtype=tl.float32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, vocabulary), column_block):
        columns = start + tl.arange(0, column_block)
        logits = _tile(hidden, weight, bias, rows, columns, tokens, vocabulary, width, scale, cap, has_bias,
                       has_cap, depth_block, widened)  # fmt: skip
        inside = (columns < vocabulary)[None, :]
        chosen += tl.sum(tl.where(columns[None, :] == own[:, None], logits, 0.0), axis=1)
        grown = tl.maximum(largest, tl.max(tl.where(inside, logits, float("-inf")), axis=1))
        shrunk = tl.exp(largest - grown)
        shares = tl.where(inside, tl.exp(logits - grown[:, None]), 0.0)
        total = total * shrunk + tl.sum(shares, axis=1)
        if with_extras:
            weighted = weighted * shrunk + tl.sum(shares * logits, axis=1)
            squares = squares * shrunk * shrunk + tl.sum(shares * shares, axis=1)
        largest = grown
    parts = tl.num_programs(1)
    at = out + tl.program_id(1) * tokens + rows
    tl.store(at, largest, mask=rows < tokens)
    tl.store(at + parts * tokens, total, mask=rows < tokens)
    tl.store(at + 2 * parts * tokens, weighted, mask=rows < tokens)
    tl.store(at + 3 * parts * tokens, squares, mask=rows < tokens)
    tl.store(at + 4 * parts * tokens, chosen, mask=rows < tokens)


@triton.jit
def _gradient(hidden, weight, bias, targets, normalizer, grad, out, tokens, vocabulary, width, scale, cap,
              has_bias: tl.constexpr, has_cap: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr,
              depth_block: tl.constexpr, widened: tl.constexpr):  # fmt: skip
    """A tile of out (N, V): the gradient of the head's product, given that of the log-probs, (N,)."""
    rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    columns = tl.program_id(1) * column_block + tl.arange(0, column_block)
    logits = _tile(hidden, weight, bias, rows, columns, tokens, vocabulary, width, scale, cap, has_bias,
                   has_cap, depth_block, widened)  # fmt: skip
    own = tl.load(targets + rows, mask=rows < tokens, other=-1)
    norm = tl.load(normalizer + rows, mask=rows < tokens, other=float("inf"))
    given = tl.load(grad + rows, mask=rows < tokens, other=0.0)
    delta = given[:, None] * (tl.where(columns[None, :] == own[:, None], 1.0, 0.0) - tl.exp(logits - norm[:, None]))
    if has_cap:
        delta *= 1.0 - (logits / cap) * (logits / cap)
    delta *= scale
    tl.store(
        out + rows.to(tl.int64)[:, None] * vocabulary + columns[None, :],
        delta.to(out.dtype.element_ty),
        mask=(rows < tokens)[:, None] & (columns < vocabulary)[None, :],
    )


def fused_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform, *, extras: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The "logps" of targets (N,) after hidden (N, H) under weight (V, H), and their normalizers log Σe^logit; all
    (N,) float32. With `extras` also the "entropy" and "alignment" of `ChunkedHead`.
    """
    hidden, weight, bias = _cast(hidden, weight, bias)
    tokens, vocabulary = len(hidden), len(weight)
    tiles = -(-vocabulary // VOCABULARY)
    parts = min(tiles, max(1, PROGRAMS // max(1, -(-tokens // TOKENS))))
    part = -(-tiles // parts) * VOCABULARY
    parts = -(-vocabulary // part)
    out = torch.empty(5, parts, tokens, dtype=torch.float32, device=hidden.device)
    if tokens:
        _sums[(-(-tokens // TOKENS), parts)](
            hidden, weight, bias, targets, out, tokens, vocabulary, hidden.shape[1], part,
            *_changes(bias, transform), with_extras=extras, **_sizes(hidden.shape[1]),
        )  # fmt: skip
    largest = out[0].amax(0)
    shrunk = torch.exp(out[0] - largest)
    total = (out[1] * shrunk).sum(0)
    normalizer = largest + total.log()
    found = {"logps": out[4].sum(0) - normalizer}
    if extras:
        found["entropy"] = normalizer - (out[2] * shrunk).sum(0) / total
        found["alignment"] = found["logps"] - ((out[3] * shrunk * shrunk).sum(0).log() - 2.0 * total.log())
    return found, normalizer


def fused_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    transform: LogitTransform,
) -> Tensor:
    """Gradient (N, V), in the weight's type, of the product of hidden (N, H) and weight (V, H), which may be a part of
    the vocabulary: targets (N,) count from its first entry and may lie outside. `grad` is that of the log-probs, (N,).
    """
    hidden, weight, bias = _cast(hidden, weight, bias)
    tokens, vocabulary = len(hidden), len(weight)
    out = torch.empty(tokens, vocabulary, dtype=weight.dtype, device=hidden.device)
    if tokens:
        _gradient[(-(-tokens // TOKENS), -(-vocabulary // VOCABULARY))](
            hidden, weight, bias, targets.contiguous(), normalizer, grad.contiguous(), out, tokens,
            vocabulary, hidden.shape[1], *_changes(bias, transform), **_sizes(hidden.shape[1]),
        )  # fmt: skip
    return out


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As a linear layer would take them: in the type of autocast, where that is on."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype).contiguous(), weight.to(dtype), None if bias is None else bias.to(dtype)


def _changes(bias: Tensor | None, transform: LogitTransform) -> tuple[float, float, bool, bool]:
    return transform.scale, transform.softcap or 1.0, bias is not None, transform.softcap is not None


# Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers.
WIDENED = not isinstance(_tile, triton.JITFunction)


def _sizes(width: int) -> dict[str, Any]:
    depth = min(DEPTH, max(16, triton.next_power_of_2(width)))
    return {"row_block": TOKENS, "column_block": VOCABULARY, "depth_block": depth, "widened": WIDENED}
