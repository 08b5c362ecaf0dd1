"""Runs on simulated hosts whose cables carry a known number of bytes a second, turn about with a run on one of them.

The hosts are those of `make test-cluster` (tests/cluster/hosts.py): they need root and Debian's iproute2 and openssh.
"""

from __future__ import annotations

import os
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.common import ROOT
from benchmarks.harness.processes import Running, Side, end_with_children, free_port
from tests.cluster.hosts import NETWORK, PACKAGES, Hosts, missing_packages

# Of the bytes of an Ethernet frame, those that are a TCP segment's content: the rest are headers and time stamps.
PAYLOAD = 1448 / 1514


@dataclass(frozen=True)
class Place:
    """Where the ranks of a side are."""

    nodes: int
    per_node: int


@dataclass(frozen=True)
class Turn:
    """What one side did in one turn."""

    rate: float  # bytes of content a second that each cable carried at most
    seconds: float  # a step, of the slowest rank
    sent: float  # bytes of content a step, by the first host


def check_machine() -> None:
    """Exit with what is missing where simulated hosts cannot be had."""
    if os.geteuid() != 0:
        raise SystemExit("simulated hosts need root; --parts tables does without them")
    if missing := missing_packages(PACKAGES):
        raise SystemExit(f"simulated hosts need Debian's packages {' '.join(missing)}")


def on_hosts(side: Side, hosts: Hosts, place: Place) -> Side:
    """The side with its ranks on the first hosts, as many on each, in place of this machine."""
    commands, port, ranks = [], free_port(), place.nodes * place.per_node
    for rank in range(ranks):
        node, local = divmod(rank, place.per_node)
        who = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": place.per_node}
        variables = {**who, "MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": port}
        command = ["env", *(f"{name}={value}" for name, value in variables.items())]
        command += [sys.executable, "-m", side.module, *side.arguments]
        commands.append(shlex.join(hosts.on(hosts.names[node], command, ROOT)))
    return replace(side, ranks=ranks, hosted=("sh", "-c", " & ".join([*commands, "wait"])))


def take_turns(
    hosts: Hosts,
    sides: Mapping[str, tuple[Side, int]],
    *,
    rates: Sequence[float],
    rounds: int,
    warmup: int,
    seed: int = 0,
) -> dict[str, list[Turn]]:
    """All turns of every side. In each round each rate is set once, in random order.

    `sides`: by name, each with its steps a turn. At each rate they run one after another, in random order.
    """
    end_with_children()
    order = random.Random(seed)
    running = {
        name: Running(side, warmup=warmup, steps=steps, turns=rounds * len(rates))
        for name, (side, steps) in sides.items()
    }
    taken: list[tuple[float, dict[str, float]]] = []
    try:
        for one in running.values():
            one.wait_for("ready")
        for _ in range(rounds):
            for rate in order.sample(list(rates), len(rates)):
                for host in hosts.names:
                    hosts.throttle(host, rate / PAYLOAD)
                sent = {}
                for name in order.sample(list(running), len(running)):
                    before = hosts.sent(hosts.names[0])
                    running[name].turn(len(taken))
                    sent[name] = PAYLOAD * (hosts.sent(hosts.names[0]) - before) / sides[name][1]
                taken.append((rate, sent))
        reports = {name: one.finish() for name, one in running.items()}
    finally:
        for one in running.values():
            one.stop()
    return {
        name: [
            Turn(rate, max(rank["turns"][turn]["wall_s"] for rank in ranks) / sides[name][1], sent[name])
            for turn, (rate, sent) in enumerate(taken)
        ]
        for name, ranks in reports.items()
    }


def folder_of(parent: Path, name: str) -> Path:
    """A new folder for what a side writes."""
    made = parent / "".join(letter if letter.isalnum() else "-" for letter in name).lower()
    made.mkdir(parents=True)
    return made


def raw(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """All turns, for a result file."""
    return {name: [vars(turn) for turn in found] for name, found in turns.items()}
