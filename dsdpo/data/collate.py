"""The two layouts by name: how groups become a batch, how batches become one, and what a pass over them costs."""

from __future__ import annotations

from collections.abc import Sequence

from dsdpo.data.batch import Packed, PreferenceBatch, collate_padded, merge_padded
from dsdpo.data.binning import LayoutName
from dsdpo.data.packed_layout import collate_packed, merge_packed
from dsdpo.data.pairs import Group


def collate(groups: Sequence[Group], *, layout: LayoutName, pad_token_id: int) -> PreferenceBatch:
    """The groups as one batch, on the CPU."""
    return collate_packed(groups) if layout == "packed" else collate_padded(groups, pad_token_id=pad_token_id)


def merge(batches: Sequence[PreferenceBatch]) -> PreferenceBatch:
    """All groups of batches of one layout as one batch, in order."""
    return merge_packed(batches) if isinstance(batches[0].attention, Packed) else merge_padded(batches)


def group_by_tokens(batches: Sequence[PreferenceBatch], budget: int) -> list[list[PreferenceBatch]]:
    """Consecutive batches in groups that hold at most `budget` tokens once merged; a batch over it stands alone."""
    groups: list[list[PreferenceBatch]] = []
    rows = longest = total = 0
    for batch in batches:
        batch_rows, batch_length = batch.input_ids.shape
        rows, longest, total = rows + batch_rows, max(longest, batch_length), total + batch.num_tokens
        tokens = total if isinstance(batch.attention, Packed) else rows * longest
        if not groups or tokens > budget:
            groups.append([])
            rows, longest, total = batch_rows, batch_length, batch.num_tokens
        groups[-1].append(batch)
    return groups
