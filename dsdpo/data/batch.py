"""What one forward pass gets: B groups (a prompt with n responses; n = 2 for pairs) as tensors, in either layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsdpo.data.pairs import Group

FILLER_ID = -1
Span = tuple[int, ...]
"""(start, shared, rest of response 1, ..., rest of response n) of one group in a packed row, in tokens."""


@dataclass(frozen=True)
class Padded:
    """nB right-padded rows, first responses of all groups, then second ones, ...: works for any causal model."""

    attention_mask: Tensor  # (nB, T) int64, 1 where a token stands

    def to(self, device: torch.device | str) -> Padded:
        """The same on `device`, copied without waiting where memory is pinned."""
        return Padded(attention_mask=self.attention_mask.to(device, non_blocking=True))


@dataclass(frozen=True, eq=False)
class Packed:
    """One row without padding; each group stands as `shared beginning | rest of response 1 | ... | rest of response n`.

    Attention is causal over S sequences: of each group, the first response (shared beginning and rest, which are
    neighbours) and the rest of each other, whose keys are the shared beginning and itself. Sequences without a token
    are left out. `spans` is for attention group by group, on the host; the tensors for attention of all in one call.
    """

    spans: tuple[Span, ...]  # B, in the row's order
    key_index: Tensor  # (K,) int64, position in the row of each sequence's keys
    query_starts: Tensor  # (S + 1,) int32, first query of each sequence in the row
    key_starts: Tensor  # (S + 1,) int32, first key of each sequence in `key_index`
    longest_query: int
    longest_key: int
    scored: np.ndarray  # (N,) int64, the batch's `score_at` on the host, for a row that is split over ranks

    @property
    def num_tokens(self) -> int:
        """T: tokens of the row."""
        start, *sizes = self.spans[-1]
        return start + sum(sizes)

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`, copied without waiting where memory is pinned."""
        tensors = ("key_index", "query_starts", "key_starts")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})


@dataclass(frozen=True)
class PreferenceBatch:
    """B groups, preference pairs as a rule, laid out for ONE forward pass.

    `score_at / targets / response` list the tokens to learn of all nB responses, so that the same scoring code serves
    every layout; a position that predicts several tokens is listed once for each, a token that is not learned is not
    listed. A pair id of -1 marks a filler: it keeps ranks in step and weighs nothing.
    """

    input_ids: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64
    attention: Padded | Packed  # what attention needs
    score_at: Tensor  # (N,) int64, flat position (row * T + column) whose hidden state predicts a response token
    targets: Tensor  # (N,) int64, those response tokens
    response: Tensor  # (N,) int64 in [0, nB): response k of group i -> k * B + i, so chosen i -> i, rejected i -> B + i
    pair_ids: Tensor  # (B,) int64, the run's number of the pair (see `BatchSource.first_pair_id`); -1 for a filler pair
    group_size: int = 2  # n
    margin: Tensor | None = None  # (B,) float32, where the data says how much better the chosen response is
    weight: Tensor | None = None  # (B,) float32, where the data weighs its pairs
    confidence: Tensor | None = None  # (B,) float32, where the data says how sure a label is, 0 to 1
    scores: Tensor | None = None  # (B, n) float32, where the data rates responses: the higher, the better
    counted: Tensor | None = None  # (R, T) bool: each token that scores a group's own responses, or leads to one, once

    @property
    def num_pairs(self) -> int:
        """B, filler pairs included."""
        return self.pair_ids.numel()

    @property
    def num_responses(self) -> int:
        """nB, those of fillers and those that a group lacks included."""
        return self.group_size * self.num_pairs

    @property
    def num_tokens(self) -> int:
        """R * T: positions that the model computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same on `device`, copied without waiting where memory is pinned."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, attention=self.attention.to(device), **tensors)


def collate_padded(groups: Sequence[Group], *, pad_token_id: int) -> PreferenceBatch:
    """The groups in the padded layout, on the CPU; T is the longest prompt + response."""
    size = len(groups[0].responses)
    prompts = [group.prompt for group in groups] * size
    responses = [group.responses[index] for index in range(size) for group in groups]
    learned = learned_places(groups)
    rows, width = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = np.full((rows, width), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((rows, width), dtype=np.int64)
    counted = np.zeros((rows, width), dtype=bool)
    shared = [common_tokens(group) for group in groups]
    score_at = []
    for row, (prompt, response, places) in enumerate(zip(prompts, responses, learned, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = response
        attention_mask[row, :end] = 1
        score_at.append(row * width + len(prompt) - 1 + places)
        index, number = divmod(row, len(groups))
        if len(response) and is_own(groups[number], index):
            counted[row, shared[number] if index else 0 : end - 1] = True
    return PreferenceBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).repeat(rows, 1),
        attention=Padded(attention_mask=torch.from_numpy(attention_mask)),
        score_at=torch.from_numpy(np.concatenate(score_at)),
        counted=torch.from_numpy(counted),
        **listed_responses(groups, learned),
    )


def common_tokens(group: Group) -> int:
    """Tokens that all of a group's sequences, without their last ones, begin with."""
    whole = [np.concatenate([group.prompt, response])[:-1] for response in group.responses if len(response)]
    return min((common_beginning(whole[0], other) for other in whole[1:]), default=len(whole[0]))


def common_beginning(first: np.ndarray, second: np.ndarray) -> int:
    """Number of equal tokens before the first that differs."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def is_own(group: Group, index: int) -> bool:
    """False for the response that a rated completion has borrowed of another prompt."""
    return group.scores is None or index < len(group.scores)


def learned_places(groups: Sequence[Group]) -> list[np.ndarray]:
    """Of each response k of group i, at k * B + i: the places in it of the tokens that are learned."""
    places = []
    for index in range(len(groups[0].responses)):
        for group in groups:
            mask = group.learned_of(index)
            places.append(np.arange(len(group.responses[index])) if mask is None else np.flatnonzero(mask))
    return places


def listed_responses(groups: Sequence[Group], learned: Sequence[np.ndarray]) -> dict[str, Any]:
    """The fields of a `PreferenceBatch` that no layout changes, by their names there."""
    size = len(groups[0].responses)
    responses = [group.responses[index] for index in range(size) for group in groups]
    targets = [response[places] for response, places in zip(responses, learned, strict=True)]
    columns: dict[str, Any] = {}
    for name in ("margin", "weight", "confidence", "scores"):
        values = [getattr(group, name) for group in groups]
        columns[name] = None if None in values else torch.tensor(values, dtype=torch.float32)
    return {
        "targets": torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        "response": torch.from_numpy(np.repeat(np.arange(len(targets)), [len(part) for part in targets])),
        "pair_ids": torch.tensor([group.pair_id for group in groups], dtype=torch.int64),
        "group_size": size,
        **columns,
    }


def filler(batch: PreferenceBatch) -> PreferenceBatch:
    """The same batch, weighing nothing: its pair ids are -1."""
    counted = None if batch.counted is None else torch.zeros_like(batch.counted)
    return replace(batch, pair_ids=torch.full_like(batch.pair_ids, FILLER_ID), counted=counted)


def merge_padded(batches: Sequence[PreferenceBatch]) -> PreferenceBatch:
    """All groups of several padded batches as one batch, in order: the first responses of all, then the second, ..."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.input_ids.shape[1] for batch in batches)
    total = sum(batch.num_pairs for batch in batches)
    group_size = batches[0].group_size
    score_at, response = [], []
    before = 0
    masks = []
    for batch in batches:
        assert isinstance(batch.attention, Padded)
        masks.append(batch.attention.attention_mask)
        size, old_width = batch.num_pairs, batch.input_ids.shape[1]
        # In this layout row and response have the same number, and both move alike.
        score_at.append(moved(batch.score_at // old_width, size, before, total) * width + batch.score_at % old_width)
        response.append(moved(batch.response, size, before, total))
        before += size
    input_ids = _stacked([batch.input_ids for batch in batches], width, group_size)
    counted = [batch.counted for batch in batches if batch.counted is not None]
    return PreferenceBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width, device=input_ids.device).repeat(group_size * total, 1),
        attention=Padded(attention_mask=_stacked(masks, width, group_size)),
        score_at=torch.cat(score_at),
        response=torch.cat(response),
        counted=_stacked(counted, width, group_size) if len(counted) == len(batches) else None,
        **joined_fields(batches),
    )


def joined_fields(batches: Sequence[PreferenceBatch]) -> dict[str, Any]:
    """The fields of merged batches that are the parts' own, one after another, by their names."""
    joined: dict[str, Any] = {"group_size": batches[0].group_size}
    for name in ("targets", "pair_ids", "margin", "weight", "confidence", "scores"):
        parts = [getattr(batch, name) for batch in batches]
        joined[name] = None if any(part is None for part in parts) else torch.cat(parts)
    return joined


def moved(responses: Tensor, size: int, before: int, total: int) -> Tensor:
    """Response numbers of a batch of `size` groups, in a batch of `total` groups where `before` come first."""
    return responses + before + responses // size * (total - size)


def _stacked(parts: Sequence[Tensor], width: int, group_size: int) -> Tensor:
    """The first n-ths of all parts, then the second ones, ..., each (rows, T) widened with zeros (masked, so any id
    serves)."""
    wide = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    shares = [part.chunk(group_size) for part in wide]
    return torch.cat([share[index] for index in range(group_size) for share in shares])
