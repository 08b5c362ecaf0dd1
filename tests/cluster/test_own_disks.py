"""A run whose output_dir is on disks that hosts do not share: trained, saved, resumed and exported all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import RANKS, Project, need
from tests.cluster.hosts import PACKAGES, Hosts
from tests.cluster.readme import command_of
from tests.cluster.test_launchers import same_run

LIMIT_S = 600


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is a disk of its own on each host."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def hosts(disk: Path) -> Iterator[Hosts]:
    need(PACKAGES)
    with Hosts(RANKS, private=[disk]) as started:
        yield started


def launch(hosts: Hosts, project: Project, run_file: Path, options: str) -> tuple[int, str]:
    """The exit code of launch/multi_node.sh, and what it and all ranks said."""
    command = command_of("ssh with a hostfile").replace("RUN.yaml", f"{run_file.name} {options}")
    done = hosts.run("node-1", ["bash", "-c", command], limit_s=LIMIT_S, folder=project.folder)
    return done.returncode, done.stdout


def test_each_host_keeps_its_part_and_the_run_is_the_same(
    hosts: Hosts, project: Project, disk: Path, one_host: Path
) -> None:
    """Stopped after a step, and resumed from a checkpoint of which each host has a part: as one host without a stop."""
    run_file = project.write("disks")
    run = yaml.safe_load(run_file.read_text()) | {"output_dir": str(disk / "run")}
    run_file.write_text(yaml.safe_dump(run))
    code, _ = launch(hosts, project, run_file, "--checkpoint.deadline 1")
    assert code == 75
    for number, name in enumerate(hosts.names):  # nobody has a file of the others'
        listed = hosts.run(name, ["find", str(disk / "run" / "checkpoints"), "-name", "*optim_states.pt"], limit_s=60)
        assert [Path(path).name for path in listed.stdout.split()] == [
            f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"
        ]
    code, said = launch(hosts, project, run_file, "--resume auto")
    assert code == 0
    assert "resumed from" in said
    copied = project.folder / "copied"
    assert hosts.run("node-1", ["cp", "-r", str(disk / "run"), str(copied)], limit_s=60).returncode == 0
    same_run(copied, one_host)
