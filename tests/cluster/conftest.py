"""What tests on simulated hosts need: root, Debian packages, and that they are asked for (`make test-cluster`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import hosts as rig
from tests.cluster.hosts import ROOT, Hosts
from tests.cluster.readme import command_of
from tests.runs import settings, train_on

ASKED = "DSDPO_TEST_CLUSTER"
RANKS = 3


def need(packages: dict[str, str]) -> None:
    """Skip the test, with the reason, where simulated hosts cannot be had."""
    if os.environ.get(ASKED) != "1":
        pytest.skip("runs on simulated hosts: make test-cluster")
    if os.geteuid() != 0:
        pytest.skip("simulated hosts need root")
    if missing := rig.missing_packages(packages):
        pytest.skip(f"needs Debian's packages {' '.join(missing)}")


@dataclass(frozen=True)
class Project:
    """A folder that all hosts see, with what commands of launch/README.md expect in their working directory."""

    folder: Path
    inputs: Path

    def write(self, name: str, **sections: Any) -> Path:
        """A run file there; its run goes to the folder of the same name. `sections`: see `tests.runs.settings`."""
        run = settings(self.folder / name, self.inputs, **sections)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    def run_folder(self, name: str) -> Path:
        """The output_dir of the run file of that name."""
        return self.folder / name / "run"


def multi_node(
    hosts: Hosts, project: Project, words: str, *, limit_s: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """launch/multi_node.sh on the first host with these words: its exit code, and what it and all ranks said."""
    command = command_of("ssh with a hostfile").replace("train RUN.yaml", words)
    words_of_shell = ["bash", "-c", command]
    return hosts.run("node-1", words_of_shell, limit_s=limit_s, folder=project.folder, **environment)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts, of which tests give back what they have cut or crashed."""
    need(rig.PACKAGES)
    with Hosts(RANKS) as started:
        yield started


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is a disk of its own on each of `hosts_with_disks`."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def hosts_with_disks(disk: Path) -> Iterator[Hosts]:
    """Three hosts of which each has the folder `disk` to itself."""
    need(rig.PACKAGES)
    with Hosts(RANKS, private=[disk]) as started:
        yield started


@pytest.fixture(scope="module")
def project(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One slot on each of the hosts; the launcher passes on what is in .deepspeed_env."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "hostfile").write_text("".join(f"node-{number} slots=1\n" for number in range(1, RANKS + 1)))
    passed_on = ("TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    environment = rig.environment_of_hosts()
    (folder / ".deepspeed_env").write_text("".join(f"{name}={environment[name]}\n" for name in passed_on))
    return Project(folder, inputs)


@pytest.fixture(scope="module")
def one_host(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same run with as many ranks on one host."""
    run = settings(tmp_path_factory.mktemp("one_host"), inputs)
    train_on(RANKS, run)
    return Path(run["output_dir"])
