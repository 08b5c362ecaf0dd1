"""Each launcher of launch/README.md, on three hosts: the weights are those of the same ranks on one host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.conftest import Project, need
from tests.cluster.hosts import PACKAGES, Hosts
from tests.cluster.readme import command_of
from tests.cluster.slurm import PACKAGES as SLURM_PACKAGES
from tests.cluster.slurm import Slurm
from tests.runs import losses, metrics

LIMIT_S = 400
# What Open MPI wants to be told where everyone is root; it is no part of a user's command.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPI = {"Open MPI": {"mpirun.openmpi": "openmpi-bin"}, "MPICH and Intel MPI": {"mpiexec.hydra": "mpich"}}


def same_run(folder: Path, one_host: Path) -> None:
    """Assert that weights, losses and each step's pairs are another run's, bit for bit, and that it learned."""
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, one_host))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(metrics(folder)) == losses(metrics(one_host))
    assert len(set(losses(metrics(folder)))) == 4
    assert (folder / "pairs.jsonl").read_bytes() == (one_host / "pairs.jsonl").read_bytes()


def on_one(hosts: Hosts, project: Project, title: str, run_file: Path, **environment: str) -> str:
    """Run the section's command on the first host; what it said."""
    command = command_of(title).replace("RUN.yaml", run_file.name)
    done = hosts.run("node-1", ["bash", "-c", command], limit_s=LIMIT_S, folder=project.folder, **environment)
    assert done.returncode == 0
    return done.stdout


def on_each(hosts: Hosts, project: Project, title: str, run_file: Path) -> None:
    """Run the section's command on every host, with its number."""
    command = command_of(title).replace("RUN.yaml", run_file.name)
    logs = [project.folder / f"{run_file.stem}-{name}.log" for name in hosts.names]
    started = [
        hosts.start(name, ["bash", "-c", command], folder=project.folder, log=log, NODE=str(number))
        for number, (name, log) in enumerate(zip(hosts.names, logs, strict=True))
    ]
    codes = [process.wait(LIMIT_S) for process in started]
    print(*(log.read_text() for log in logs), sep="\n")
    assert codes == [0, 0, 0]


def test_ssh(hosts: Hosts, project: Project, one_host: Path) -> None:
    on_one(hosts, project, "ssh with a hostfile", project.write("ssh"))
    same_run(project.run_folder("ssh"), one_host)


@pytest.mark.parametrize("title", ["By hand, without ssh", "torchrun", "Kubernetes"])
def test_started_on_each_host(hosts: Hosts, project: Project, one_host: Path, title: str) -> None:
    name = title.split()[0].lower()
    on_each(hosts, project, title, project.write(name))
    same_run(project.run_folder(name), one_host)


@pytest.mark.parametrize("title", MPI)
def test_mpi(hosts: Hosts, project: Project, one_host: Path, title: str) -> None:
    need(PACKAGES | MPI[title])
    name = title.split()[0].lower() + "-mpi"
    on_one(hosts, project, title, project.write(name), **AS_ROOT)
    same_run(project.run_folder(name), one_host)


def test_slurm(hosts: Hosts, project: Project, one_host: Path) -> None:
    need(PACKAGES | SLURM_PACKAGES)
    run_file = project.write("slurm")
    words = command_of("Slurm").replace("RUN.yaml", run_file.name).split()
    assert words.pop(0) == "sbatch"
    with Slurm(hosts) as slurm:
        job = slurm.submit(words, folder=project.folder)
        ended = slurm.wait(job, "COMPLETED", "FAILED", limit_s=LIMIT_S)
    print((project.folder / f"dsdpo-{job}.log").read_text())
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0")
    same_run(project.run_folder("slurm"), one_host)
