"""The packed layout: one row a micro-batch, no padding, and what all responses of a group begin with stands once.

A group's sequences are prompt + response for each response, without their last tokens, from which nothing is predicted.
What they have in common, at least the prompt, is computed once; positions of each further rest follow it again. Sharing
is exact: a token's hidden state depends only on the tokens before it.
Source: Wang & Hegde 2024 (arXiv 2410.20305), here with the longest common beginning in place of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsdpo.data.batch import (
    Packed,
    PreferenceBatch,
    Span,
    common_tokens,
    is_own,
    joined_fields,
    learned_places,
    listed_responses,
    moved,
)
from dsdpo.data.pairs import Group


def collate_packed(groups: Sequence[Group]) -> PreferenceBatch:
    """The groups in the packed layout, on the CPU: R is 1, T the sum of their tokens."""
    size = len(groups[0].responses)
    input_ids: list[np.ndarray] = []
    position_ids: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    score_at: list[list[np.ndarray]] = [[] for _ in range(size)]
    spans: list[Span] = []
    learned = learned_places(groups)
    start = 0
    for number, group in enumerate(groups):
        whole = [np.concatenate([group.prompt, response])[:-1] for response in group.responses if len(response)]
        shared = common_tokens(group)
        rests = [len(ids) - shared for ids in whole] + [0] * (size - len(whole))
        at = start  # where the rest of the response stands, less what it shares
        for index, ids in enumerate(whole):
            new = ids if index == 0 else ids[shared:]
            input_ids.append(new)
            position_ids.append(np.arange(len(ids) - len(new), len(ids)))
            counted.append(np.full(len(new), is_own(group, index)))
            places = len(group.prompt) - 1 + learned[index * len(groups) + number]
            score_at[index].append(start + places + (places >= shared) * (at - start))
            at += rests[index]
        spans.append((start, shared, *rests))
        start += shared + sum(rests)
    flat = np.concatenate([part for parts in score_at for part in parts]).astype(np.int64, copy=False)
    return PreferenceBatch(
        input_ids=_int64(input_ids)[None],
        position_ids=_int64(position_ids)[None],
        attention=packed(spans, flat),
        score_at=torch.from_numpy(flat),
        counted=torch.from_numpy(np.concatenate(counted))[None],
        **listed_responses(groups, learned),
    )


def packed(spans: Sequence[Span], scored: np.ndarray) -> Packed:
    """What attention needs to know of groups that stand one after another; `scored` as in `Packed`."""
    queries: list[int] = []
    keys: list[np.ndarray] = []
    for start, shared, first, *others in spans:
        end = start + shared + first
        queries.append(shared + first)
        keys.append(np.arange(start, end))
        for rest in others:
            if rest:
                queries.append(rest)
                keys.append(np.r_[start : start + shared, end : end + rest])
                end += rest
    lengths = [len(part) for part in keys]
    return Packed(
        spans=tuple(spans),
        key_index=_int64(keys),
        query_starts=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        key_starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        longest_query=max(queries),
        longest_key=max(lengths),
        scored=scored,
    )


def merge_packed(batches: Sequence[PreferenceBatch]) -> PreferenceBatch:
    """All groups of several packed batches in one row, in order. Waits for no device."""
    if len(batches) == 1:
        return batches[0]
    total = sum(batch.num_pairs for batch in batches)
    layouts, score_at, response = [], [], []
    counted: list[Any] = [batch.counted for batch in batches]
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
        response=torch.cat(response),
        counted=None if any(part is None for part in counted) else torch.cat(counted, dim=1),
        **joined_fields(batches),
    )


def _joined(layouts: Sequence[Packed], tokens: Sequence[int]) -> Packed:
    """The layouts of rows of so many tokens, as the layout of these rows one after another."""
    spans: list[Span] = []
    scored: list[np.ndarray] = []
    key_index, query_starts, key_starts = [], [layouts[0].query_starts[:1]], [layouts[0].key_starts[:1]]
    row = keys = 0
    for layout, length in zip(layouts, tokens, strict=True):
        spans += [(start + row, *rest) for start, *rest in layout.spans]
        scored.append(layout.scored + row)
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
        scored=np.concatenate(scored),
    )


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
