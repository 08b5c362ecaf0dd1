"""What one forward pass gets: B preference pairs laid out as tensors, in either layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dsdpo.data.pairs import Pair

FILLER_ID = -1
Span = tuple[int, int, int, int]  # (start, shared, chosen rest, rejected rest) of one pair in a packed row, in tokens


@dataclass(frozen=True)
class Padded:
    """2B rows, chosen then rejected, right-padded: works for any causal language model."""

    attention_mask: Tensor  # (2B, T) int64, 1 where a token stands

    def to(self, device: torch.device | str) -> Padded:
        """The same on `device`, copied without waiting where memory is pinned."""
        return Padded(attention_mask=self.attention_mask.to(device, non_blocking=True))


@dataclass(frozen=True, eq=False)
class Packed:
    """One row without padding; each pair stands as `shared beginning | rest of chosen | rest of rejected`.

    Attention is causal over S sequences: of each pair, chosen (shared beginning and rest, which are neighbours) and the
    rest of rejected, whose keys are the shared beginning and itself. Sequences without a token are left out. `spans`
    is for attention pair by pair, on the host; the tensors for attention of all pairs in one call.
    """

    spans: tuple[Span, ...]  # B, in the row's order
    key_index: Tensor  # (K,) int64, position in the row of each sequence's keys
    query_starts: Tensor  # (S + 1,) int32, first query of each sequence in the row
    key_starts: Tensor  # (S + 1,) int32, first key of each sequence in `key_index`
    longest_query: int
    longest_key: int

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`, copied without waiting where memory is pinned."""
        tensors = ("key_index", "query_starts", "key_starts")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})


@dataclass(frozen=True)
class PreferenceBatch:
    """B pairs laid out for ONE forward pass.

    `score_at / targets / response` list the response tokens of all 2B responses, so that the same scoring code
    serves every layout; a position that predicts several tokens is listed once for each. A pair id of -1 marks a filler
    pair: it keeps ranks in step and weighs nothing.
    """

    input_ids: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64
    attention: Padded | Packed  # what attention needs
    score_at: Tensor  # (N,) int64, flat position (row * T + column) whose hidden state predicts a response token
    targets: Tensor  # (N,) int64, those response tokens
    response: Tensor  # (N,) int64 in [0, 2B): chosen i -> i, rejected i -> B + i
    pair_ids: Tensor  # (B,) int64, the run's number of the pair (see `BatchSource.first_pair_id`); -1 for a filler pair

    @property
    def num_pairs(self) -> int:
        """B, filler pairs included."""
        return self.pair_ids.numel()

    @property
    def num_tokens(self) -> int:
        """R * T: positions that the model computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same on `device`, copied without waiting where memory is pinned."""
        tensors = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "attention"
        }
        return PreferenceBatch(attention=self.attention.to(device), **tensors)


def collate_padded(pairs: Sequence[Pair], *, pad_token_id: int) -> PreferenceBatch:
    """The pairs in the padded layout, on the CPU; T is the longest prompt + response."""
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows, width = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = np.full((rows, width), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((rows, width), dtype=np.int64)
    score_at = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = response
        attention_mask[row, :end] = 1
        score_at.append(row * width + np.arange(len(prompt) - 1, end - 1))
    return PreferenceBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).repeat(rows, 1),
        attention=Padded(attention_mask=torch.from_numpy(attention_mask)),
        score_at=torch.from_numpy(np.concatenate(score_at)),
        targets=torch.from_numpy(np.concatenate(responses).astype(np.int64)),
        response=torch.from_numpy(np.repeat(np.arange(rows), [len(response) for response in responses])),
        pair_ids=torch.tensor([pair.pair_id for pair in pairs], dtype=torch.int64),
    )


def filler(batch: PreferenceBatch) -> PreferenceBatch:
    """The same batch, weighing nothing: its pair ids are -1."""
    return replace(batch, pair_ids=torch.full_like(batch.pair_ids, FILLER_ID))


def merge_padded(batches: Sequence[PreferenceBatch]) -> PreferenceBatch:
    """All pairs of several padded batches as one batch, in order: chosen rows of all, then rejected rows of all."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.input_ids.shape[1] for batch in batches)
    total = sum(batch.num_pairs for batch in batches)
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
    input_ids = _stacked([batch.input_ids for batch in batches], width)
    return replace(
        batches[0],
        input_ids=input_ids,
        position_ids=torch.arange(width, device=input_ids.device).repeat(2 * total, 1),
        attention=Padded(attention_mask=_stacked(masks, width)),
        score_at=torch.cat(score_at),
        targets=torch.cat([batch.targets for batch in batches]),
        response=torch.cat(response),
        pair_ids=torch.cat([batch.pair_ids for batch in batches]),
    )


def moved(responses: Tensor, size: int, before: int, total: int) -> Tensor:
    """Response numbers of a batch of `size` pairs, in a batch of `total` pairs where `before` come first."""
    return responses + before + (responses >= size) * (total - size)


def _stacked(parts: Sequence[Tensor], width: int) -> Tensor:
    """First halves of all parts, then second halves, each (rows, T) widened with zeros (masked, so any id serves)."""
    wide = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    halves = [part.chunk(2) for part in wide]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
