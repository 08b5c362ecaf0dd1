"""Hosts that crash, vanish or do not start under launch/multi_node.sh: every process and the launcher end, and say why.

Times that are asserted are far above those that are printed (pytest -s): they tell an end from none.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.conftest import Project
from tests.cluster.hosts import Hosts, wait_until
from tests.cluster.readme import command_of
from tests.runs import metrics

LIMIT_S = 600
ENDS_S = 240  # after a loss, on a busy machine
ENDLESS = {"train": {"max_steps": 5000}, "distributed": {"lost_after": 20}, "checkpoint": {"every_steps": 2}}


def launch(
    hosts: Hosts, project: Project, run_file: Path, *, options: str = "", **environment: str
) -> tuple[subprocess.Popen[str], Path]:
    """launch/multi_node.sh on the first host; what it and all ranks say goes to the file."""
    command = command_of("ssh with a hostfile").replace("RUN.yaml", f"{run_file.name} {options}")
    log = project.folder / f"{run_file.stem}.log"
    return hosts.start("node-1", ["bash", "-c", command], folder=project.folder, log=log, **environment), log


def has_steps(launcher: subprocess.Popen[str], log: Path, folder: Path, steps: int) -> bool:
    """Whether so many steps have been taken; fails if the launcher has ended."""
    assert launcher.poll() is None, log.read_text()
    return (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= steps


def is_empty(hosts: Hosts, name: str, run_file: Path) -> bool:
    """Whether no process of the run is left on the host."""
    return not hosts.processes(name, run_file.name, "dsdpo")


def ends(hosts: Hosts, launcher: subprocess.Popen[str], log: Path, run_file: Path, names: list[str]) -> str:
    """What was said, once the launcher and all ranks on these hosts have ended; when each did is printed."""
    left: dict[str, Callable[[], bool]] = {name: partial(is_empty, hosts, name, run_file) for name in names}
    left["the launcher"] = lambda: launcher.poll() is not None
    started = time.monotonic()

    def all_ended() -> bool:
        for name in [name for name, ended in left.items() if ended()]:
            del left[name]
            print(f"{name} ended after {time.monotonic() - started:.1f} s", flush=True)
        return not left

    try:
        wait_until(all_ended, limit_s=ENDS_S, what="the end of everything")
    finally:
        print(f"left: {sorted(left)}, exit code of the launcher {launcher.poll()}\n{log.read_text()}")
    assert launcher.returncode != 0
    return log.read_text()


def test_crashed_host_ends_the_run_which_goes_on_without_it(hosts: Hosts, project: Project) -> None:
    run_file, folder = project.write("crash", **ENDLESS), project.run_folder("crash")
    launcher, log = launch(hosts, project, run_file)
    wait_until(partial(has_steps, launcher, log, folder, 4), limit_s=LIMIT_S, what="four steps")
    hosts.crash("node-3")
    try:
        said = ends(hosts, launcher, log, run_file, ["node-1", "node-2"])
        assert "node-3" in said.split("train 0/")[-1]
        (project.folder / "two_hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
        taken = len(metrics(folder))
        options = f"--resume auto --train.max_steps {taken + 3} --checkpoint.allow_changes train.max_steps"
        launcher, log = launch(hosts, project, run_file, options=options, HOSTFILE="two_hosts")
        assert launcher.wait(LIMIT_S) == 0, log.read_text()
        assert "ranks were 3 and are 2" in log.read_text()
        assert [row["step"] for row in metrics(folder)] == list(range(1, taken + 4))
    finally:
        hosts.boot("node-3")


@pytest.mark.parametrize("name", ["node-3", "node-1"])
def test_host_that_vanishes_holds_nobody_up(hosts: Hosts, project: Project, name: str) -> None:
    """Its cable is cut: nothing comes any more, not even that nothing will. Node-1 has rank 0 and the launcher."""
    run_file, folder = project.write(f"cut-{name}", **ENDLESS), project.run_folder(f"cut-{name}")
    launcher, log = launch(hosts, project, run_file)
    wait_until(partial(has_steps, launcher, log, folder, 2), limit_s=LIMIT_S, what="two steps")
    hosts.cut(name)
    try:
        said = ends(hosts, launcher, log, run_file, [*(other for other in hosts.names if other != name), name])
        assert "--resume auto" in said
        if name != "node-1":
            assert f"({name}" in said or f"on {name}" in said
    finally:
        hosts.mend(name)


def test_host_without_the_environment_is_named_and_ends_the_launcher(hosts: Hosts, project: Project) -> None:
    """Python is not there on node-2: its ranks cannot start, and the others do not wait for half an hour."""
    prefix = sys.prefix
    assert hosts.run("node-2", ["mount", "-t", "tmpfs", "none", prefix], limit_s=60).returncode == 0
    run_file = project.write("missing")
    try:
        launcher, log = launch(hosts, project, run_file)
        wait_until(lambda: "did not come" in log.read_text(), limit_s=LIMIT_S, what="that node-2 is missed")
        said = ends(hosts, launcher, log, run_file, ["node-1", "node-3"])
    finally:
        hosts.run("node-2", ["umount", prefix], limit_s=60)
    assert "multi_node.sh: node-2 did not start its ranks. It said:" in said
    assert "No such file or directory" in said.split("It said:")[1]
