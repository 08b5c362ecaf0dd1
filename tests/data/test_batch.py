"""The padded layout, against numbers written out by hand."""

from __future__ import annotations

import numpy as np
import torch

from dsdpo.data.batch import PreferenceBatch, collate_padded, filler, merge_padded
from dsdpo.data.pairs import Group


def pair(pair_id: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Group:
    return Group.of(pair_id, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)))


FIRST = pair(7, [1, 2], [3, 4], [5])
SECOND = pair(3, [6], [7], [8, 9, 10])


def test_two_pairs_by_hand() -> None:
    batch = collate_padded([FIRST, SECOND], pad_token_id=99)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4],  # chosen of FIRST
        [6, 7, 99, 99],  # chosen of SECOND
        [1, 2, 5, 99],  # rejected of FIRST
        [6, 8, 9, 10],  # rejected of SECOND
    ]
    assert batch.attention.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 4
    # Each response token is predicted one column before its own: 3 at (0, 1), 4 at (0, 2), 7 at (1, 0) ...
    assert batch.score_at.tolist() == [1, 2, 4, 9, 12, 13, 14]
    assert batch.targets.tolist() == [3, 4, 7, 5, 8, 9, 10]
    assert batch.response.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.pair_ids.tolist() == [7, 3]
    assert (batch.num_pairs, batch.num_tokens) == (2, 16)
    # The prompts once, and of each response all but the last token.
    assert batch.counted is not None
    assert batch.counted.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    tensors = [value for name, value in vars(batch).items() if isinstance(value, torch.Tensor) and name != "counted"]
    assert {tensor.dtype for tensor in [*tensors, batch.attention.attention_mask]} == {torch.int64}


def test_filler_is_a_batch_without_pairs() -> None:
    real = collate_padded([FIRST, SECOND], pad_token_id=0)
    batch = filler(real)
    assert batch.pair_ids.tolist() == [-1, -1]
    assert torch.equal(batch.input_ids, real.input_ids)
    assert torch.equal(batch.score_at, real.score_at)


def assert_same(left: PreferenceBatch, right: PreferenceBatch) -> None:
    for name in ("input_ids", "position_ids", "pair_ids"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert torch.equal(left.attention.attention_mask, right.attention.attention_mask)

    def scored(batch: PreferenceBatch) -> list[tuple[int, int, int]]:
        return sorted(zip(batch.response.tolist(), batch.score_at.tolist(), batch.targets.tolist(), strict=True))

    assert scored(left) == scored(right)


def test_merged_batches_are_the_batch_of_all_their_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = [
            pair(i, *(rng.integers(1, 50, rng.integers(1, 9)).tolist() for _ in range(3)))
            for i in range(rng.integers(2, 9))
        ]
        cuts = sorted(set(rng.integers(1, len(pairs), 2).tolist()))
        parts = [pairs[start:end] for start, end in zip([0, *cuts], [*cuts, len(pairs)], strict=True)]
        merged = merge_padded([collate_padded(part, pad_token_id=0) for part in parts])
        assert_same(merged, collate_padded(pairs, pad_token_id=0))


def test_merged_batches_keep_their_order_and_fillers() -> None:
    merged = merge_padded([collate_padded([FIRST], pad_token_id=0), filler(collate_padded([SECOND], pad_token_id=0))])
    assert merged.pair_ids.tolist() == [7, -1]
    assert merged.input_ids.tolist() == [[1, 2, 3, 4], [6, 7, 0, 0], [1, 2, 5, 0], [6, 8, 9, 10]]
    assert merged.score_at.tolist() == [1, 2, 9, 4, 12, 13, 14]
    assert merged.response.tolist() == [0, 0, 2, 1, 3, 3, 3]


def test_to_moves_every_tensor() -> None:
    moved = collate_padded([FIRST], pad_token_id=0).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in [*tensors, moved.attention.attention_mask]} == {"meta"}
