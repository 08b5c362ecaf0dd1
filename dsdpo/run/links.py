"""How fast ranks reach each other: all-reduce and all-gather by size, within nodes, between them, and over all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.distributed as dist

from dsdpo.distributed import by_host, gather_objects, node, rank, world_size
from dsdpo.engine.build import device
from dsdpo.run.health import Finding

SIZES = (4, 1 << 20, 1 << 24)  # bytes; the first one's time is the latency
REPEATS = 5
UNLIKE = 4.0  # times the fastest group's time for the largest size, from which on a group is slow


def link_findings() -> list[Finding]:
    """What collectives take in each kind of group, the same on all ranks. Collective."""
    if world_size() == 1:
        return [Finding("ok", "links", "one rank has nobody to talk to")]
    found = []
    for name, groups in kinds_of_groups().items():
        mine = None
        for ranks in groups:
            group = dist.new_group(ranks)  # by all ranks, also those that are not in it
            if rank() in ranks:
                mine = (ranks, measure(group, len(ranks)))
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
        measured = {one[0]: one[1] for one in gather_objects(mine) if one is not None}
        found += list(judged(name, measured))
    return found


def kinds_of_groups() -> dict[str, list[tuple[int, ...]]]:
    """Groups of ranks by what their messages cross. Collective."""
    nodes: dict[int, list[int]] = {}
    for of_rank, of_node in enumerate(gather_objects(node())):
        nodes.setdefault(of_node, []).append(of_rank)
    within = [tuple(ranks) for ranks in nodes.values() if len(ranks) > 1]
    between = [tuple(ranks[0] for ranks in nodes.values())] if len(nodes) > 1 else []
    kinds = {"within nodes": within, "between nodes": between, "all ranks": [tuple(range(world_size()))]}
    if len(nodes) == 1 or not within:
        del kinds["all ranks"]  # the same as one of the others
    return {name: groups for name, groups in kinds.items() if groups}


def measure(group: dist.ProcessGroup, size: int) -> list[tuple[float, float]]:
    """Seconds of an all-reduce and of an all-gather for each of `SIZES`, medians. Collective in the group."""
    return [
        (_seconds(_all_reduce(count, group), group), _seconds(_all_gather(count, group, size), group))
        for count in SIZES
    ]


def _all_reduce(count: int, group: dist.ProcessGroup) -> Callable[[], None]:
    values = torch.ones(count // 4, device=device())
    return lambda: dist.all_reduce(values, group=group) and None


def _all_gather(count: int, group: dist.ProcessGroup, size: int) -> Callable[[], None]:
    whole = torch.ones(max(count // 4 // size, 1) * size, device=device())
    own = whole[: len(whole) // size].clone()
    return lambda: dist.all_gather_into_tensor(whole, own, group=group) and None


def _seconds(collective: Callable[[], None], group: dist.ProcessGroup) -> float:
    taken = []
    collective()  # connections are made at the first
    for _ in range(REPEATS):
        dist.barrier(group)
        _wait_for_device()
        began = time.perf_counter()
        collective()
        _wait_for_device()
        taken.append(time.perf_counter() - began)
    return median(taken)


def _wait_for_device() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def judged(name: str, measured: dict[tuple[int, ...], list[tuple[float, float]]]) -> Iterator[Finding]:
    """A finding for each group of a kind: latency, and bytes per second through each rank's link by size.

    Of n ranks, a link carries 2(n - 1)/n of an all-reduced size each way, and (n - 1)/n of an all-gathered one.
    """
    fastest = min(times[-1][0] for times in measured.values())
    for ranks, times in measured.items():
        share = (len(ranks) - 1) / len(ranks)
        figures = [f"latency {times[0][0] * 1e6:.0f} us"]
        for size, (reduced, gathered) in list(zip(SIZES, times, strict=True))[1:]:
            rates = f"{2 * share * size / reduced / 1e9:.2f} and {share * size / gathered / 1e9:.2f}"
            figures.append(f"{size >> 20} MiB at {rates} GB/s")
        slow = times[-1][0] > UNLIKE * fastest
        remedy = f"{times[-1][0] / fastest:.0f} times the fastest node's time" if slow else ""
        what = f"all-reduce and all-gather {name}"
        yield Finding("yellow" if slow else "ok", what, ", ".join(figures), remedy, by_host(ranks))
