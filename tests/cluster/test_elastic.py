"""torchrun elastic on three hosts: one is lost and comes back, and the run is the one that was left alone."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Project
from tests.cluster.hosts import Hosts, wait_until
from tests.cluster.readme import command_of
from tests.runs import losses, metrics, train_on

LIMIT_S = 600
STEPS = 200


def agent(hosts: Hosts, project: Project, name: str, run_file: Path) -> tuple[subprocess.Popen[str], Path]:
    """torchrun on a host, by the README's command; what it and its rank say goes to the file."""
    command = command_of("torchrun elastic").replace("RUN.yaml", run_file.name)
    earlier = len(list(project.folder.glob(f"agent-{name}-*.log")))
    log = project.folder / f"agent-{name}-{earlier}.log"
    return hosts.start(name, ["bash", "-c", command], folder=project.folder, log=log), log


def has_said(agents: dict[str, tuple[subprocess.Popen[str], Path]], words: str) -> bool:
    """Whether one of the agents or its rank has said so; fails if an agent has ended."""
    for name, (process, log) in agents.items():
        assert process.poll() is None, f"torchrun on {name} ended with {process.returncode}:\n{log.read_text()}"
    return any(words in log.read_text() for _, log in agents.values())


def has_steps(agents: dict[str, tuple[subprocess.Popen[str], Path]], folder: Path, steps: int) -> bool:
    """Whether so many steps have been taken; fails if an agent has ended."""
    has_said(agents, "")
    return (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= steps


def test_lost_host_is_done_without_and_taken_back(hosts: Hosts, project: Project) -> None:
    run_file = project.write(
        "elastic",
        optimizer={"learning_rate": 1e-4},
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 2, "resume": "auto"},
        distributed={"min_ranks": 2},
    )
    folder = project.run_folder("elastic")
    agents = {name: agent(hosts, project, name, run_file) for name in hosts.names}
    wait_until(partial(has_steps, agents, folder, 6), limit_s=LIMIT_S, what="six steps on three hosts")
    hosts.crash("node-3")
    del agents["node-3"]
    seconds = wait_until(partial(has_said, agents, "ranks were 3 and are 2"), limit_s=LIMIT_S, what="a start on two")
    print(f"two hosts went on after {seconds:.1f} s")
    hosts.boot("node-3")
    agents["node-3"] = agent(hosts, project, "node-3", run_file)
    seconds = wait_until(partial(has_said, agents, "ranks were 2 and are 3"), limit_s=LIMIT_S, what="a start on three")
    print(f"three hosts went on {seconds:.1f} s after the third came back, of which a half is its own start")
    codes = [process.wait(LIMIT_S) for process, _ in agents.values()]
    assert codes == [0, 0, 0]
    alone = yaml.safe_load(
        project.write("alone", optimizer={"learning_rate": 1e-4}, train={"max_steps": STEPS}).read_text()
    )
    expected = losses(train_on(3, alone))
    assert losses(metrics(folder)) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.01, "it learned nothing"
    assert (folder / "pairs.jsonl").read_bytes() == (project.run_folder("alone") / "pairs.jsonl").read_bytes()
