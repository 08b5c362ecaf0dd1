"""Attention over the packed layout, as a function that transformers' models call in place of their own.

A model gets the batch's `Packed` as the keyword argument `packed`, which transformers hands through to every layer's
attention; no mask over the whole row is ever made. Where there is no `packed` (padded batches, generation) the same
function is ordinary attention. Shapes: N tokens of the row, H query heads, G key and value heads, D head size.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsdpo.data.batch import Packed
from dsdpo.errors import ConfigError
from dsdpo.objective.sequence_parallel import own_heads, own_tokens, whole_row
from dsdpo.sequence_group import SequenceGroup

log = logging.getLogger(__name__)

NAMES = {
    "auto": "dsdpo",
    "sdpa": "dsdpo_sdpa",
    "flash_attention_2": "dsdpo",
    "flash_attention_3": "dsdpo",
    "flash_attention_4": "dsdpo_flash4",
}
"""model.attn_implementation -> the registered name of what takes its place for packed batches.

"dsdpo_sdpa" goes pair by pair on every device; "dsdpo" takes flash attention for all pairs at once where it can;
"dsdpo_flash4" flash-attn 4, which is not finished and taken only where it is asked for.
"""

SHORT = 64  # tokens; sequences up to here are computed together
ROWS = 1024  # queries that one explicit mask covers: bounds its size
KEPT_SCORES = 4096  # queries of a sequence up to which explicit scores are kept for the backward pass
# torch's kernel for CPUs passes over hidden keys only where there are 512 in a row: blocks of queries that end at their
# last visible key take a third less time at 512 keys, a seventh less at 900, no less beyond.
ROWS_ON_CPU, KEYS_IN_BLOCKS_ON_CPU = 128, 1024


@dataclass(frozen=True)
class Variant:
    """What a layer's attention has beyond softmax(q·k·scale)·v over all earlier tokens."""

    scale: float | None
    dropout: float
    window: int | None  # tokens that a token sees, itself included
    softcap: float | None
    sinks: Tensor | None  # (H,) logits of a key without value


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    sequence: SequenceGroup | None = None,
    varlen: bool = True,
    flash4: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention (1, N, H, D) of query (1, H, N, D) over key and value (1, G, N, D), under transformers' argument names.

    With `varlen`, CUDA takes one variable-length flash attention for all pairs where there is a kernel for it, with
    `flash4` flash-attn 4's. With `sequence`, N are this rank's tokens of the row, and attention over the whole row is
    shared by heads.
    """
    variant = Variant(scaling, dropout, sliding_window, softcap or None, s_aux)
    if packed is None:
        if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and query.shape[2] > 1:
            # The stand-in for a mask that comes with `packed`, without it: every token would see every other.
            raise ConfigError(f"{type(module).__name__} was not told of the packed row: set data.layout to padded")
        if variant.softcap is None and variant.sinks is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
            )
        if attention_mask is None:
            attention_mask = _band(query, query.shape[2], key.shape[2], None)
        return _explicit(query, key, value, attention_mask, variant).transpose(1, 2), None
    unknown = [name for name in ("position_bias", "cache") if others.get(name) is not None]
    if unknown or others.get("is_causal") is False:
        raise ConfigError(f"{type(module).__name__} uses {unknown or 'is_causal=False'}: set data.layout to padded")
    if sequence is not None:
        query, key, value = whole_row(query, key, value, packed.num_tokens, sequence)
        variant = replace(variant, sinks=own_heads(variant.sinks, sequence))
    kernel = varlen_kernel(query, variant, flash4=flash4) if varlen else None
    if kernel is not None:
        result = attend_at_once(query, key, value, packed, variant, kernel)
    else:
        result = attend_by_pair(query, key, value, packed, variant)
    return result if sequence is None else own_tokens(result, sequence), None


def attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, variant: Variant, kernel: Kernel
) -> Tensor:
    """(1, N, H, D) from one variable-length call; the keys of shared beginnings are copied for each sequence.

    `kernel` aligns each sequence's causal mask with its last key, as flash attention does.
    """
    size = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - size))  # latent attention's values are shorter than its keys
    keys, values = (part[0].transpose(0, 1).index_select(0, packed.key_index) for part in (key, value))
    return kernel(query[0].transpose(0, 1), keys, values, packed, variant)[None, ..., :size]


def attend_by_pair(query: Tensor, key: Tensor, value: Tensor, packed: Packed, variant: Variant) -> Tensor:
    """(1, N, H, D) from scaled_dot_product_attention: long pairs one by one, short ones together in padded rows."""
    short = _short_pairs(packed, query.device)
    done: list[Tensor] = []
    if short.count < len(packed.spans):
        # One split of the row, since the gradient of each single slice would be a whole row of zeros.
        lengths = [part for _, shared, rest, *others in packed.spans for part in (shared + rest, *others)]
        q, k, v = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
        first = 0
        for _, shared, *rests in packed.spans:
            following = range(first + 1, first + len(rests))
            if not is_short(shared, rests):
                done += _causal(q[first], k[first], v[first], variant)
                for at in following:
                    if lengths[at]:
                        keys, values = (torch.cat([part[first][:, :, :shared], part[at]], dim=2) for part in (k, v))
                        done += _causal(q[at], keys, values, variant)
            first = following.stop
    rows = [part.transpose(1, 2)[0] for part in done]
    if short.index is not None:
        wide = [tensor[0].transpose(0, 1)[short.index].transpose(1, 2) for tensor in (query, key, value)]
        rows.append(torch.cat(_causal(wide[0], wide[1], wide[2], variant), dim=2).transpose(1, 2).flatten(0, 1))
    result = rows[0] if len(rows) == 1 else torch.cat(rows)
    return (result if short.order is None else result.index_select(0, short.order))[None]


def is_short(shared: int, rests: Sequence[int]) -> bool:
    """True if a call of its own would cost a group more than it computes."""
    return shared + max(rests) <= SHORT


@dataclass(frozen=True)
class ShortPairs:
    """The short groups of a row, as padded rows of one sequence each; padding follows, so that causality masks it."""

    count: int
    index: Tensor | None  # (rows, T) int64, position in the packed row
    order: Tensor | None  # (N,) int64, where a position's result stands: long pairs one by one, then `index`


@lru_cache(maxsize=4)
def _short_pairs(packed: Packed, device: torch.device) -> ShortPairs:
    """Found once a batch, not in every layer."""
    short = [span for span in packed.spans if is_short(span[1], span[2:])]
    if not short:
        return ShortPairs(0, None, None)
    width = max(shared + max(rests) for _, shared, *rests in short)
    order = np.empty(packed.num_tokens, dtype=np.int64)
    at = 0
    for start, *parts in (span for span in packed.spans if not is_short(span[1], span[2:])):
        size = sum(parts)
        order[start : start + size] = np.arange(at, at + size)
        at += size
    rows: list[np.ndarray] = []
    for start, shared, first, *others in short:
        end = start + shared + first
        order[start:end] = at + len(rows) * width + np.arange(shared + first)
        rows.append(np.r_[start:end, np.full(width - shared - first, start)])
        for rest in others:
            if rest:
                order[end : end + rest] = at + len(rows) * width + np.arange(shared, shared + rest)
                rows.append(np.r_[start : start + shared, end : end + rest, np.full(width - shared - rest, start)])
                end += rest
    found = (torch.from_numpy(part) for part in (np.stack(rows), order))
    if device.type == "cuda":  # from other memory the copy would wait for all that is queued
        found = (part.pin_memory() for part in found)
    index, places = (part.to(device, non_blocking=True) for part in found)
    return ShortPairs(len(short), index, places)


def _causal(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> list[Tensor]:
    """(B, H, Q, D), in parts along Q: each query sees the keys up to its own, the last query all K >= Q keys."""
    queries, keys = query.shape[2], key.shape[2]
    plain = variant.softcap is None and variant.sinks is None
    window = variant.window if variant.window is not None and variant.window < keys else None
    on_cpu = query.device.type == "cpu"
    if plain and window is None and queries == keys and not (on_cpu and ROWS_ON_CPU < keys <= KEYS_IN_BLOCKS_ON_CPU):
        return [_sdpa(query, key, value, variant, is_causal=True)]
    blocks = []
    rows = ROWS_ON_CPU if on_cpu else ROWS
    for start in range(0, queries, rows):
        count = min(rows, queries - start)
        end = keys - queries + start + count
        first = 0 if window is None else max(0, end - count + 1 - window)
        block = query[:, :, start : start + count], key[:, :, first:end], value[:, :, first:end]
        mask = _band(query, count, end - first, window)
        if plain:
            blocks.append(_sdpa(*block, variant, attn_mask=mask))
        elif queries > KEPT_SCORES and torch.is_grad_enabled():
            # The scores of all blocks together are the square of the row: each block's are made again when needed.
            blocks.append(checkpoint(_explicit, *block, mask, variant, use_reentrant=False))
        else:
            blocks.append(_explicit(*block, mask, variant))
    return blocks


def _sdpa(query: Tensor, key: Tensor, value: Tensor, variant: Variant, **mask: Any) -> Tensor:
    options: dict[str, Any] = {"dropout_p": variant.dropout, "scale": variant.scale}
    return scaled_dot_product_attention(query, key, value, **mask, **options, enable_gqa=query.shape[1] != key.shape[1])


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, variant: Variant) -> Tensor:
    """(B, H, Q, D) with all scores in memory, for what no kernel of torch's has: soft-capping and sinks.

    `mask` is bool, true where a key is seen, or added; (Q, K) or (B, 1, Q, K). Sources: Gemma 2 (arXiv 2408.00118) and
    gpt-oss (arXiv 2508.10925), whose softmax has one logit more for each head, without a value.
    """
    groups, size = key.shape[1], query.shape[-1]
    grouped = query.unflatten(1, (groups, -1))
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2) * (size**-0.5 if variant.scale is None else variant.scale)
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    mask = mask if mask.dim() == 2 else mask.unsqueeze(1)
    # Not -inf: a row of padding may see nothing at all, and its NaN would spread.
    hidden = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    if variant.sinks is not None:
        sinks = variant.sinks.view(1, groups, -1, 1, 1).expand(len(query), -1, -1, scores.shape[3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    return (dropout(shares, variant.dropout) @ value.unsqueeze(2)).flatten(1, 2)


def _band(like: Tensor, queries: int, keys: int, window: int | None) -> Tensor:
    """(queries, keys) to add to scores, 0 or -inf: the last query sees the last `window` keys, or all."""
    # Few sizes, of which the mask is a part, so that it is made once and not anew in each layer.
    rows, before = (
        max(least, 1 << (size - 1).bit_length()) for least, size in ((ROWS_ON_CPU, queries), (ROWS, keys - queries))
    )
    cut = before - (keys - queries)
    return _wide_band(rows, before, window, like.dtype, like.device)[:queries, cut : cut + keys]


@lru_cache(maxsize=4)
def _wide_band(rows: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    distance = torch.arange(before, before + rows, device=device)[:, None] - torch.arange(before + rows, device=device)
    seen = (distance >= 0) & (distance < (before + rows if window is None else window))
    return torch.zeros(rows, before + rows, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))


Kernel = Callable[[Tensor, Tensor, Tensor, Packed, Variant], Tensor]
"""(N, H, D), (K, G, D), (K, G, D), the row and the variant -> (N, H, D)"""


def varlen_kernel(query: Tensor, variant: Variant, *, flash4: bool = False) -> Kernel | None:
    """The flash attention kernel that takes all pairs at once, or None where none can; on a GPU it is said once why."""
    if not query.is_cuda:
        return None
    reason = no_kernel_for(query.dtype, query.shape[-1], variant, _capability(query.device))
    if flash4 and reason is None and (function := _flash4_function()) is not None:
        return partial(_flash_varlen, function, unbounded=None)
    flash, torch_varlen = _varlen_functions() if reason is None else (None, None)
    if flash is not None:
        return partial(_flash_varlen, flash)
    if reason is None and torch_varlen is not None and variant.softcap is None:
        return partial(_torch_varlen, torch_varlen)
    _tell_once(reason or f"{'soft-capping needs flash-attn' if variant.softcap else 'flash-attn'}, not installed")
    return None


def no_kernel_for(
    dtype: torch.dtype, head_size: int, variant: Variant, capability: tuple[int, int] | None
) -> str | None:
    """Why no variable-length kernel can compute this attention, None if one can. `capability` is CUDA's, None: ROCm."""
    if capability is not None and capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0 (Ampere)"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels take 16-bit numbers, not {str(dtype).removeprefix('torch.')}"
    if head_size > 256 or head_size % 8:
        return f"the kernels take heads of up to 256 numbers, by eights, not {head_size}"
    if variant.sinks is not None:
        return "the kernels have no attention sinks"
    return "the kernels are not used with dropout" if variant.dropout else None


@lru_cache(maxsize=8)
def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


@lru_cache(maxsize=32)
def _tell_once(reason: str) -> None:
    log.warning("attention goes pair by pair, which is slower with the same results: %s", reason)


@lru_cache(maxsize=1)
def _varlen_functions() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """`flash_attn_varlen_func` of flash-attn 3 or 2, and torch's `varlen_attn`, where installed and able to load."""
    flash = None
    for name in ("flash_attn", "flash_attn_interface"):  # the later one, flash-attn 3, wins
        try:
            # flash-attn 4 has a `flash_attn` too, an empty one around its own package.
            flash = getattr(importlib.import_module(name), "flash_attn_varlen_func", None) or flash
        except ModuleNotFoundError:
            continue
        except Exception as error:  # built for another torch or CUDA
            log.warning("%s is installed but does not load (%s): it is not used", name, error)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return flash, None
    known = "window_size" in inspect.signature(varlen_attn).parameters  # 2.10 had is_causal in its place
    return flash, varlen_attn if known else None


@lru_cache(maxsize=1)
def _flash4_function() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of flash-attn 4, where installed and able to load."""
    try:
        found: Callable[..., Any] = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
        return found
    except Exception as error:
        log.warning("flash-attn 4 is asked for and does not load (%s): attention goes without it", error)
        return None


def _flash_varlen(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    variant: Variant,
    *,
    unbounded: int | None = -1,
) -> Tensor:
    """`unbounded`: what the function takes for a window without end."""
    result = function(
        query,
        key,
        value,
        cu_seqlens_q=packed.query_starts,
        cu_seqlens_k=packed.key_starts,
        max_seqlen_q=packed.longest_query,
        max_seqlen_k=packed.longest_key,
        softmax_scale=variant.scale,
        causal=True,
        window_size=(unbounded, unbounded) if variant.window is None else (variant.window - 1, 0),
        softcap=variant.softcap or 0.0,
    )
    return result[0] if isinstance(result, tuple) else result  # flash-attn 3 gave the normalizers too


def _torch_varlen(
    function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, packed: Packed, variant: Variant
) -> Tensor:
    options: dict[str, Any] = {"window_size": (-1 if variant.window is None else variant.window - 1, 0)}
    groups = query.shape[1] // key.shape[1]
    if _knows_groups(function):
        options["enable_gqa"] = groups > 1
    elif groups > 1:  # torch 2.11
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    starts = packed.query_starts, packed.key_starts
    return function(
        query, key, value, *starts, packed.longest_query, packed.longest_key, scale=variant.scale, **options
    )


@lru_cache(maxsize=8)
def _knows_groups(function: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


for _name, _function in {
    "dsdpo": attention,
    "dsdpo_sdpa": partial(attention, varlen=False),
    "dsdpo_flash4": partial(attention, flash4=True),
}.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
