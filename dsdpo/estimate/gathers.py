"""Which parameters ZeRO-3 holds whole at a time, by going through a pass as DeepSpeed's coordinator does.

Source: `PartitionedParameterCoordinator` of DeepSpeed 0.19.8. Its limits are in elements: it prefetches up to a bucket
ahead, keeps a module's parameters if they are used again within the reuse distance, and prefetches no further once so
many are live. Parameters up to the persistence threshold stay whole for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsdpo.estimate.weights import Part, Weights

# DeepSpeed's defaults, for what a config leaves out.
PREFETCH, PERSISTENCE, LIVE, REUSE = 50_000_000, 100_000, 1_000_000_000, 1_000_000_000


@dataclass(frozen=True)
class Gathers:
    """Of one pass, in elements."""

    live: int  # most at a time, beside what persists
    persistent: int  # whole on every rank all the time
    received: int  # gathered in all, by collectives
    largest: int  # of one collective: its parts are copied into place, so that it stands twice for a moment
    calls: int  # collectives


def gathers_of(weights: Weights, zero: dict[str, Any], *, backward: bool, checkpointing: bool = False) -> Gathers:
    """What a stage-3 engine with this `zero_optimization` block gathers in a forward or a forward and backward pass."""
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE)
    most_persistent = zero.get("stage3_model_persistence_threshold")
    prefetch, most_live, reuse = (
        int(zero.get(name, default))
        for name, default in (
            ("stage3_prefetch_bucket_size", PREFETCH),
            ("stage3_max_live_parameters", LIVE),
            ("stage3_max_reuse_distance", REUSE),
        )
    )
    persistent, needs = _without_persistent(weights, threshold, most_persistent)
    trace = [part for part in _trace(weights.parts, backward=backward, checkpointing=checkpointing) if needs[part]]
    owner = {part: _owner(weights.parts, part) for part in range(len(weights.parts))}
    uses = [owner[part] for part in trace]
    sizes = [needs[part] for part in trace]
    live: dict[int, int] = {}
    most = received = largest = calls = 0
    ahead = 0  # place in the trace up to which parameters have been prefetched
    for at, (part, size) in enumerate(zip(uses, sizes, strict=True)):
        if part not in live:
            live[part] = size
            received += size
            calls += 1
            largest = max(largest, size)
        ahead, asked = max(ahead, at + 1), 0
        while ahead < len(uses) and asked < min(most_live - sum(live.values()), prefetch):
            if uses[ahead] not in live:
                live[uses[ahead]] = sizes[ahead]
                asked += sizes[ahead]
                received += sizes[ahead]
            ahead += 1
        calls += asked > 0
        largest = max(largest, asked)
        most = max(most, sum(live.values()))
        if not _reused(uses, sizes, at, reuse) and part not in uses[at + 1 : ahead]:
            live.pop(part, None)
    return Gathers(most, persistent, received, largest, calls)


def _without_persistent(weights: Weights, threshold: float, most: float | None) -> tuple[int, list[int]]:
    """Elements that persist, and of each part those that do not."""
    persistent, needs = 0, []
    for part in weights.parts:
        need = 0
        for size in part.sizes:
            if size <= threshold and (most is None or persistent + size <= most):
                persistent += 0 if part.repeats else size
            else:
                need += size
        needs.append(need)
    return persistent, needs


def _trace(parts: Sequence[Part], *, backward: bool, checkpointing: bool) -> list[int]:
    """Parts by number in the order in which a pass uses them; a layer that was dropped is run again first."""
    forward = list(range(len(parts)))
    if not backward:
        return forward
    trace, at = list(forward), len(forward)
    while at:
        block = parts[at - 1].block
        start = at - 1
        while checkpointing and block is not None and start and parts[start - 1].block == block:
            start -= 1
        again = forward[start:at]
        if checkpointing and block is not None:
            trace += again
        trace += reversed(again)
        at = start
    return trace


def _owner(parts: Sequence[Part], number: int) -> int:
    """The part whose parameters these are: itself, or the earlier one of the same sizes that it is tied to."""
    if not parts[number].repeats:
        return number
    return next(i for i, part in enumerate(parts) if not part.repeats and part.sizes == parts[number].sizes)


def _reused(uses: Sequence[int], sizes: Sequence[int], at: int, distance: int) -> bool:
    """Whether a part is used again before so many elements have been passed."""
    passed = 0
    for part, size in zip(uses[at + 1 :], sizes[at + 1 :], strict=True):
        if passed >= distance:
            return False
        if part == uses[at]:
            return True
        passed += size
    return False
