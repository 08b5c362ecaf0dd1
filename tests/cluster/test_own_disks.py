"""Runs whose folders are on disks that hosts do not share: trained, saved, resumed and exported all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Project, multi_node
from tests.cluster.hosts import Hosts
from tests.cluster.test_launchers import same_run
from tests.runs import losses, metrics

LIMIT_S = 600


def test_each_host_keeps_its_part_and_the_run_is_the_same(
    hosts_with_disks: Hosts, project: Project, disk: Path, one_host: Path
) -> None:
    """Stopped after a step, and resumed from a checkpoint of which each host has a part: as one host without a stop."""
    hosts, run_file = hosts_with_disks, project.write("disks")
    run = yaml.safe_load(run_file.read_text()) | {"output_dir": str(disk / "run")}
    run_file.write_text(yaml.safe_dump(run))
    words = f"train {run_file.name}"
    assert multi_node(hosts, project, f"{words} --checkpoint.deadline 1", limit_s=LIMIT_S).returncode == 75
    for number, name in enumerate(hosts.names):  # nobody has a file of the others'
        listed = hosts.run(name, ["find", str(disk / "run" / "checkpoints"), "-name", "*optim_states.pt"], limit_s=60)
        assert [Path(path).name for path in listed.stdout.split()] == [
            f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"
        ]
    done = multi_node(hosts, project, f"{words} --resume auto", limit_s=LIMIT_S)
    assert done.returncode == 0
    assert "resumed from" in done.stdout
    copied = project.folder / "copied"
    assert hosts.run("node-1", ["cp", "-r", str(disk / "run"), str(copied)], limit_s=60).returncode == 0
    same_run(copied, one_host)


def test_a_store_of_which_each_host_has_a_part_is_read_whole(
    hosts_with_disks: Hosts, project: Project, disk: Path, one_host: Path
) -> None:
    """Each host stores what it has scored; training finds all of it, and its losses are those of a run that scores."""
    hosts, store = hosts_with_disks, disk / "store"
    run_file = project.write("stored", reference={"strategy": "precomputed", "store": str(store)})
    assert multi_node(hosts, project, f"precompute {run_file.name}", limit_s=LIMIT_S).returncode == 0
    listings = [hosts.run(name, ["find", str(store), "-name", "part-*.parquet"], limit_s=60) for name in hosts.names]
    parts = [set(listed.stdout.split()) for listed in listings]
    assert all(parts)
    assert not set.intersection(*parts)
    done = multi_node(hosts, project, f"train {run_file.name}", limit_s=LIMIT_S)
    assert done.returncode == 0
    assert "reference on train data: 1,728 pairs, 1,728 known" in done.stdout
    assert " 0 scored" in done.stdout
    assert losses(metrics(project.run_folder("stored"))) == pytest.approx(losses(metrics(one_host)), abs=1e-6)
