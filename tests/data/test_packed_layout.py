"""The packed layout, against numbers written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsdpo.data.batch import Packed, PreferenceBatch, filler
from dsdpo.data.collate import group_by_tokens, merge
from dsdpo.data.packed_layout import collate_packed
from dsdpo.data.pairs import Group
from tests.tiny import random_pairs


def pair(pair_id: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Group:
    return Group.of(pair_id, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)))


# Sequences 1 2 3 | 4 5 and 1 2 3 | 6, then 7 | 8 | (no token predicted from 9) and 7 | 10 11.
FIRST = pair(7, [1, 2], [3, 4, 5, 6], [3, 7, 8])
SECOND = pair(3, [7], [8, 9], [10, 11, 12])


def spans_of(batch: PreferenceBatch) -> tuple[tuple[int, ...], ...]:
    assert isinstance(batch.attention, Packed)
    return batch.attention.spans


def test_two_pairs_by_hand() -> None:
    batch = collate_packed([FIRST, SECOND])
    #                                   1 2 3 shared, 4 5 chosen, 7 rejected; 7 shared, 8 chosen, 10 11 rejected
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 7, 8, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    # The 3 that both responses begin with is scored for both; the token after it is predicted twice from one place.
    assert batch.score_at.tolist() == [1, 2, 3, 4, 6, 7, 1, 2, 5, 6, 8, 9]
    assert batch.targets.tolist() == [3, 4, 5, 6, 8, 9, 3, 7, 8, 10, 11, 12]
    assert batch.response.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.pair_ids.tolist() == [7, 3]
    assert (batch.num_pairs, batch.num_tokens) == (2, 10)
    layout = batch.attention
    assert isinstance(layout, Packed)
    assert layout.spans == ((0, 3, 2, 1), (6, 1, 1, 2))
    assert layout.query_starts.tolist() == [0, 5, 6, 8, 10]
    assert layout.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9]
    assert layout.key_starts.tolist() == [0, 5, 9, 11, 14]
    assert (layout.longest_query, layout.longest_key) == (5, 5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "span", "ids"),
    [
        ([5], [6], (0, 2, 0, 0), [1, 2]),  # nothing but the prompt predicts anything
        ([5, 6, 7], [5, 6, 7], (0, 4, 0, 0), [1, 2, 5, 6]),  # twice the same response
        ([5, 6], [5, 6, 7], (0, 3, 0, 1), [1, 2, 5, 6]),  # one begins as the whole other
        ([5, 6, 7, 8], [5], (0, 2, 3, 0), [1, 2, 5, 6, 7]),
    ],
)
def test_responses_that_share_much(chosen: list[int], rejected: list[int], span: tuple, ids: list[int]) -> None:
    batch = collate_packed([pair(0, [1, 2], chosen, rejected)])
    assert spans_of(batch) == (span,)
    assert batch.input_ids.tolist() == [ids]
    layout = batch.attention
    assert isinstance(layout, Packed)
    assert len(layout.query_starts) == 2 + (span[3] > 0), "a sequence without a token is left out"
    for response, tokens in enumerate((chosen, rejected)):
        assert batch.targets[batch.response == response].tolist() == tokens


def assert_same(left: PreferenceBatch, right: PreferenceBatch) -> None:
    for name in ("input_ids", "position_ids", "pair_ids"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert isinstance(left.attention, Packed)
    assert isinstance(right.attention, Packed)
    for batch in (left, right):
        assert isinstance(batch.attention, Packed)
        assert batch.attention.scored.tolist() == batch.score_at.tolist()
    for name, value in vars(left.attention).items():
        if name == "scored":  # in the order of the batch's responses
            continue
        other = getattr(right.attention, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name

    def scored(batch: PreferenceBatch) -> list[tuple[int, int, int]]:
        return sorted(zip(batch.response.tolist(), batch.score_at.tolist(), batch.targets.tolist(), strict=True))

    assert scored(left) == scored(right)


def test_merged_batches_are_the_batch_of_all_their_pairs() -> None:
    rng = np.random.default_rng(0)
    for seed in range(50):
        pairs = random_pairs(int(rng.integers(2, 9)), seed=seed, vocab=6)  # few tokens: beginnings are often equal
        cuts = sorted(rng.choice(np.arange(1, len(pairs)), size=min(2, len(pairs) - 1), replace=False))
        parts = [part.tolist() for part in np.split(np.arange(len(pairs)), cuts)]
        merged = merge([collate_packed([pairs[index] for index in part]) for part in parts])
        assert_same(merged, collate_packed(pairs))


def test_fillers_and_devices() -> None:
    batch = collate_packed([FIRST])
    assert filler(batch).pair_ids.tolist() == [-1]
    moved = batch.to("meta")
    assert isinstance(moved.attention, Packed)
    tensors = [value for part in (moved, moved.attention) for value in vars(part).values() if torch.is_tensor(value)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == 10
    assert moved.attention.spans == spans_of(batch)


def test_groups_hold_the_sum_of_their_tokens() -> None:
    batches = [collate_packed(random_pairs(2, seed=seed)) for seed in range(20)]
    groups = group_by_tokens(batches, 150)
    assert [batch for group in groups for batch in group] == batches
    sums = [sum(batch.num_tokens for batch in group) for group in groups]
    assert all(total <= 150 or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    # Greedy: no batch would still have fitted in the group before its own.
    assert all(total + after[0].num_tokens > 150 for total, after in zip(sums, groups[1:], strict=False))
    assert len(group_by_tokens(batches, 1)) == 20
