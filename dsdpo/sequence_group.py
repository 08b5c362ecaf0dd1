"""Sequence parallelism: which ranks share one packed row, each holding a part of its tokens.

DeepSpeed is told nothing of it: its engines shard weights and average gradients over all ranks, at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.distributed as dist

from dsdpo.distributed import gather_objects, node, rank, world_size


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that get the same pairs as this one and share the tokens of each row; by default this rank alone."""

    size: int = 1  # ranks in it
    place: int = 0  # of this rank in it
    number: int = 0  # of the group among all groups
    groups: int = 1  # in all
    handle: Any = None  # torch's process group of its ranks; None: this rank is alone
    spans_nodes: bool = False  # whether any group has ranks on several nodes

    @property
    def counts(self) -> bool:
        """True on the one rank of the group that counts its pairs where numbers are added up over all ranks."""
        return self.place == 0

    def part(self, length: int) -> tuple[int, int]:
        """First position of this rank's part of a row of `length` tokens, and the positions of each rank's part.

        The last parts may reach beyond the row, over fewer positions than there are ranks: those are padding.
        """
        size = -(-length // self.size)
        return self.place * size, size

    def computed(self, length: int) -> tuple[int, int]:
        """Positions of a row of `length` tokens that this rank computes, and those of them beyond the row."""
        start, size = self.part(length)
        return size, min(size, max(0, start + size - length))


ALONE = SequenceGroup()  # of a run whose rows are not split, wherever nothing depends on which rank this is


def ranks_of_groups(nodes: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The ranks of each sequence group, from the node of each rank: neighbours on a node wherever they fit there."""
    order = sorted(range(len(nodes)), key=lambda peer: (nodes[peer], peer))
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


@lru_cache(maxsize=8)
def sequence_group(size: int) -> SequenceGroup:
    """This rank's group of `size` ranks, which divides their number. Collective, once in a process for each size."""
    if size == 1:
        return SequenceGroup(number=rank(), groups=world_size())
    nodes = gather_objects(node())
    groups = ranks_of_groups(nodes, size)
    handles = [dist.new_group(list(ranks)) for ranks in groups]
    number = next(index for index, ranks in enumerate(groups) if rank() in ranks)
    return SequenceGroup(
        size=size,
        place=groups[number].index(rank()),
        number=number,
        groups=len(groups),
        handle=handles[number],
        spans_nodes=any(len({nodes[peer] for peer in ranks}) > 1 for ranks in groups),
    )
