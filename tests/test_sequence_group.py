"""Which ranks share a row, and which positions of it each computes."""

from __future__ import annotations

import pytest

from dsdpo.sequence_group import SequenceGroup, ranks_of_groups


def test_groups_stay_on_a_node_wherever_they_fit() -> None:
    assert ranks_of_groups([0, 0, 0, 0], 2) == [(0, 1), (2, 3)]
    assert ranks_of_groups([0, 0, 2, 2], 4) == [(0, 1, 2, 3)]
    # Slurm may deal tasks out to nodes by turns.
    assert ranks_of_groups([0, 1, 0, 1], 2) == [(0, 2), (1, 3)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_cover_a_row_once(size: int, length: int) -> None:
    groups = [SequenceGroup(size=size, place=place) for place in range(size)]
    covered = [position for group in groups for position in range(group.part(length)[0], sum(group.part(length)))]
    assert covered == list(range(len(covered)))
    assert length <= len(covered) < length + size
    computed, beyond = (sum(numbers) for numbers in zip(*(group.computed(length) for group in groups), strict=True))
    assert (computed, beyond) == (len(covered), len(covered) - length)
    assert [group.counts for group in groups] == [True] + [False] * (size - 1)
