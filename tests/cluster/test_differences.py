"""Hosts that were set up differently: one message that names hosts and fields, exit code 2 on all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

import dsdpo
from tests.cluster.conftest import RANKS, Project, multi_node
from tests.cluster.hosts import ROOT, Hosts

LIMIT_S = 600
AHEAD_S = 12
# Read by Python at its start, as any file of this name on its path: the host's clock is ahead.
CLOCK = f"""
import time

_clock = time.clock_gettime
time.clock_gettime = lambda clock: _clock(clock) + ({AHEAD_S} if clock == time.CLOCK_REALTIME else 0)
"""


def disk_of(project: Project, disk: Path, name: str, **sections: Any) -> Path:
    """What is to be on a host's disk: the code, the model and a run file that names both by their place there."""
    folder = project.folder / f"disk of {name}"
    shutil.copytree(ROOT / "dsdpo", folder / "code" / "dsdpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(project.inputs / "model", folder / "model")
    run = yaml.safe_load(project.write("differs", **sections).read_text())
    run["model"]["path"] = str(disk / "model")
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def put(hosts: Hosts, name: str, folder: Path, disk: Path) -> None:
    """Make that the content of the host's disk."""
    words = 'rm -rf "$2"/* && cp -r "$1"/. "$2"'
    assert hosts.run(name, ["sh", "-c", words, "put", str(folder), str(disk)], limit_s=60).returncode == 0


def test_settings_models_and_code_that_differ_end_all_hosts(
    hosts_with_disks: Hosts, project: Project, disk: Path
) -> None:
    """On node-2 another beta and other pairs_per_step, on node-3 another config.json and other code of that version."""
    hosts = hosts_with_disks
    folders = {
        "node-1": disk_of(project, disk, "node-1"),
        "node-2": disk_of(project, disk, "node-2", loss={"beta": 0.7}, batch={"pairs_per_step": 4}),
        "node-3": disk_of(project, disk, "node-3"),
    }
    config = folders["node-3"] / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    losses = folders["node-3"] / "code" / "dsdpo" / "objective" / "losses" / "margins.py"
    losses.write_text(losses.read_text() + "\nBETA_TIMES = 2\n")
    for name, folder in folders.items():
        put(hosts, name, folder, disk)
    done = multi_node(hosts, project, f"train {disk}/run.yaml", limit_s=LIMIT_S, PYTHONPATH=str(disk / "code"))
    said = done.stdout
    assert done.returncode == 2
    assert said.count("exited with exit code 2") == RANKS
    assert said.count("ranks were started with different things") == 1
    both = "on node-1 (rank 0), node-3 (rank 2)"
    for line in (
        f"loss.beta: 0.1 {both}, 0.7 on node-2 (rank 1)",
        f"batch.pairs_per_step: 8 {both}, 4 on node-2 (rank 1)",
        "config.json of model.path: rms_norm_eps: 1e-06 on node-1 (rank 0), node-2 (rank 1), 0.001 on node-3 (rank 2)",
        f"dsdpo's code: {dsdpo.__version__}, digest ",
    ):
        assert line in said
    code = next(line for line in said.splitlines() if "dsdpo's code: " in line)
    assert code.endswith("on node-3 (rank 2)")
    assert "Traceback" not in said
    assert not project.run_folder("differs").exists()


def test_a_clock_that_is_ahead_is_told_and_ends_nothing(hosts_with_disks: Hosts, project: Project, disk: Path) -> None:
    hosts, ahead = hosts_with_disks, disk_of(project, disk, "the one ahead")
    put(hosts, "node-1", ahead, disk)
    put(hosts, "node-3", ahead, disk)
    (ahead / "code" / "sitecustomize.py").write_text(CLOCK)
    put(hosts, "node-2", ahead, disk)
    words = f"train {disk}/run.yaml --dry-run"
    done = multi_node(hosts, project, words, limit_s=LIMIT_S, PYTHONPATH=str(disk / "code"))
    assert done.returncode == 0
    assert "nodes differ, without harm to the numbers: " in done.stdout
    assert f"node-2 (rank 1) is {AHEAD_S} s ahead of " in done.stdout
