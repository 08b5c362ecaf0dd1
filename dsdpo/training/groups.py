"""Which pairs metrics are given apart for: those of a source, of a held-out set, of a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from dsdpo.config.data import SourceConfig
from dsdpo.data.pairs import Pairs

GROUPED = ("loss", "rewards/accuracies", "rewards/margins")  # what training gives apart


@dataclass(frozen=True)
class Grouping:
    """One way to tell N pairs apart."""

    names: list[str]  # of K groups, as they begin the names of metrics
    of: np.ndarray  # (N,) int64 in [0, K), by place in the data set


def groupings(pairs: Pairs, sources: Sequence[SourceConfig], edges: Sequence[int]) -> list[Grouping]:
    """By named set, by source and by length, where there is more than one of a kind."""
    found = []
    source = pairs.origins[:, 0].astype(np.int64)
    sets = list(dict.fromkeys(entry.set for entry in sources if entry.set is not None))
    if sets:
        found.append(Grouping(sets, np.array([sets.index(str(entry.set)) for entry in sources])[source]))
    if len(sources) > 1:
        found.append(Grouping([f"source/{name}" for name in source_names(sources)], source))
    if edges:
        own = pairs.lengths[:, 1:] if pairs.borrowed is None else pairs.lengths[:, 1:2]
        lengths = pairs.lengths[:, 0] + own.max(1)
        found.append(Grouping([f"length/{name}" for name in bucket_names(edges)], np.searchsorted(edges, lengths)))
    return found


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A short name for each source: the last part of its path, with subset, split or number where they are alike."""
    short = [PurePath(entry.path).stem for entry in sources]
    for attribute in ("name", "split"):
        longer = [getattr(entry, attribute) for entry in sources]
        doubled = {name for name in short if short.count(name) > 1}
        named = zip(short, longer, strict=True)
        short = [f"{name}-{more}" if name in doubled and more else name for name, more in named]
    return [f"{name}-{place}" if short.count(name) > 1 else name for place, name in enumerate(short)]


def bucket_names(edges: Sequence[int]) -> list[str]:
    """Of lengths in tokens: 1-256, 257-1024, 1025-."""
    starts = [1, *(edge + 1 for edge in edges)]
    return [f"{start}-{end}" for start, end in zip(starts, [*map(str, edges), ""], strict=True)]


class DeviceGroups:
    """Groups of a data set's pairs, looked up on the device by the run's number of a pair."""

    def __init__(self, found: Sequence[Grouping], *, device: torch.device, first_pair_id: int = 0) -> None:
        self._found = [(group.names, torch.from_numpy(group.of).to(device)) for group in found]
        self._first = first_pair_id

    def of(self, pair_ids: Tensor) -> list[tuple[list[str], Tensor]]:
        """Names and (B,) group of each kind; a filler pair gets any."""
        places = (pair_ids - self._first).clamp(min=0)
        return [(names, of[places]) for names, of in self._found]
