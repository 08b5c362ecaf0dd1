"""The packed layout: one row a micro-batch, no padding, and what both responses of a pair begin with stands once.

A pair's sequences are prompt + chosen and prompt + rejected without their last tokens, from which nothing is
predicted. What they have in common, at least the prompt, is computed once; positions of the rejected rest follow it
again. Sharing is exact: a token's hidden state depends only on the tokens before it.
Source: Wang & Hegde 2024 (arXiv 2410.20305), here with the longest common beginning in place of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from dsdpo.data.batch import Packed, PreferenceBatch, Span, moved
from dsdpo.data.pairs import Pair


def collate_packed(pairs: Sequence[Pair]) -> PreferenceBatch:
    """The pairs in the packed layout, on the CPU: R is 1, T the sum of their tokens."""
    input_ids: list[np.ndarray] = []
    position_ids: list[np.ndarray] = []
    chosen_at: list[np.ndarray] = []
    rejected_at: list[np.ndarray] = []
    spans: list[Span] = []
    start = 0
    for pair in pairs:
        first = np.concatenate([pair.prompt, pair.chosen])[:-1]
        second = np.concatenate([pair.prompt, pair.rejected])[:-1]
        shared = common_beginning(first, second)
        input_ids += [first, second[shared:]]
        position_ids += [np.arange(len(first)), np.arange(shared, len(second))]
        chosen_at.append(start + np.arange(len(pair.prompt) - 1, len(first)))
        at = np.arange(len(pair.prompt) - 1, len(second))
        rejected_at.append(start + at + (at >= shared) * (len(first) - shared))
        spans.append((start, shared, len(first) - shared, len(second) - shared))
        start += len(first) + len(second) - shared
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return PreferenceBatch(
        input_ids=_int64(input_ids)[None],
        position_ids=_int64(position_ids)[None],
        attention=packed(spans),
        score_at=_int64(chosen_at + rejected_at),
        targets=_int64(responses),
        response=torch.from_numpy(np.repeat(np.arange(len(responses)), [len(response) for response in responses])),
        pair_ids=torch.tensor([pair.pair_id for pair in pairs], dtype=torch.int64),
    )


def common_beginning(first: np.ndarray, second: np.ndarray) -> int:
    """Number of equal tokens before the first that differs."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def packed(spans: Sequence[Span]) -> Packed:
    """What attention needs to know of pairs that stand one after another."""
    queries: list[int] = []
    keys: list[np.ndarray] = []
    for start, shared, chosen, rejected in spans:
        end = start + shared + chosen
        queries.append(shared + chosen)
        keys.append(np.arange(start, end))
        if rejected:
            queries.append(rejected)
            keys += [np.r_[start : start + shared, end : end + rejected]]
    lengths = [len(part) for part in keys]
    return Packed(
        spans=tuple(spans),
        key_index=_int64(keys),
        query_starts=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        key_starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        longest_query=max(queries),
        longest_key=max(lengths),
    )


def merge_packed(batches: Sequence[PreferenceBatch]) -> PreferenceBatch:
    """All pairs of several packed batches in one row, in order. Waits for no device."""
    if len(batches) == 1:
        return batches[0]
    total = sum(batch.num_pairs for batch in batches)
    layouts, score_at, response = [], [], []
    before = row = 0
    for batch in batches:
        assert isinstance(batch.attention, Packed)
        layouts.append(batch.attention)
        score_at.append(batch.score_at + row)
        response.append(moved(batch.response, batch.num_pairs, before, total))
        before, row = before + batch.num_pairs, row + batch.num_tokens
    return PreferenceBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches], dim=1),
        position_ids=torch.cat([batch.position_ids for batch in batches], dim=1),
        attention=_joined(layouts, [batch.num_tokens for batch in batches]),
        score_at=torch.cat(score_at),
        targets=torch.cat([batch.targets for batch in batches]),
        response=torch.cat(response),
        pair_ids=torch.cat([batch.pair_ids for batch in batches]),
    )


def _joined(layouts: Sequence[Packed], tokens: Sequence[int]) -> Packed:
    """The layouts of rows of so many tokens, as the layout of these rows one after another."""
    spans: list[Span] = []
    key_index, query_starts, key_starts = [], [layouts[0].query_starts[:1]], [layouts[0].key_starts[:1]]
    row = keys = 0
    for layout, length in zip(layouts, tokens, strict=True):
        spans += [(start + row, *rest) for start, *rest in layout.spans]  # type: ignore[misc]
        key_index.append(layout.key_index + row)
        query_starts.append(layout.query_starts[1:] + row)
        key_starts.append(layout.key_starts[1:] + keys)
        row, keys = row + length, keys + len(layout.key_index)
    return replace(
        layouts[0],
        spans=tuple(spans),
        key_index=torch.cat(key_index),
        query_starts=torch.cat(query_starts),
        key_starts=torch.cat(key_starts),
        longest_query=max(layout.longest_query for layout in layouts),
        longest_key=max(layout.longest_key for layout in layouts),
    )


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
