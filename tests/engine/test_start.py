"""Whoever starts the processes: each knows which of how many it is, or says in one message why it cannot."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsdpo import distributed
from dsdpo.console import Launched, is_main, launched, launched_rank
from dsdpo.engine.start import adopt, first_host
from dsdpo.errors import ConfigError
from tests.commands.processes import finish
from tests.warm import warm_dsdpo, warm_python

LIMIT_S = 240
WORDS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "MV2_", "MVP_", "PMI", "MPI_", "PALS_", "SLURM_")


@pytest.fixture(autouse=True)
def _nothing_said() -> Iterator[None]:
    """No launcher's variables, and afterwards those that were there: adopting one sets them for the process."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(WORDS):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


OMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2",
         "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[2-3]"}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launched("nobody", 0, 1, 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launched("RANK", 1, 2, 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Launched("RANK", 1, 4, 1, 2)),
        (OMPI, Launched("Open MPI", 3, 4, 1, 2)),
        ({name.replace("OMPI_", "MV2_"): value for name, value in OMPI.items()}, Launched("MVAPICH", 3, 4, 1, 2)),
        ({name.replace("OMPI_", "MVP_"): value for name, value in OMPI.items()}, Launched("MVAPICH", 3, 4, 1, 2)),
        # deepspeed --launcher mpich and impi
        (
            {"PMI_RANK": "3", "WORLD_SIZE": "4", "PMI_LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
            Launched("MPI (PMI)", 3, 4, 1, 2),
        ),
        (
            {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Launched("MPI (PMI)", 3, 4, 1, 2),
        ),
        (SLURM, Launched("Slurm", 3, 4, 1, 2)),
        # mpirun inside a Slurm job, whose own variables are of the job's first task
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **OMPI}, Launched("Open MPI", 3, 4, 1, 2)),
        # srun --pty bash, then one process
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launched("nobody", 0, 1, 0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, Launched("nobody", 0, 1, 0, 1)),
        ({"WORLD_SIZE": "1"}, Launched("nobody", 0, 1, 0, 1)),
    ],
)
def test_rank_is_read_from_each_launchers_variables(
    variables: dict[str, str], expected: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected
    assert is_main() == (expected.rank == 0)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, ("RANK is 1", "WORLD_SIZE is not set")),
        ({"WORLD_SIZE": "2"}, ("WORLD_SIZE is 2", "set RANK")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("OMPI_COMM_WORLD_SIZE is 2", "which of the processes")),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, ("PMI_RANK is 1 of 2", "MPI_LOCALRANKID")),
        ({"PMIX_RANK": "1"}, ("PMIX_RANK is 1", "how many")),
        ({"RANK": "two", "WORLD_SIZE": "2"}, ("RANK is 'two'", "whole number")),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK is 2", "2 processes only")),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ("RANK is '-1'",)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ("SLURM_NTASKS", "srun")),
    ],
)
def test_incomplete_launcher_variables_are_refused(
    variables: dict[str, str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        launched()
    for word in words:
        assert word in str(refused.value)
    assert launched_rank() == variables.get("RANK", "0")


def test_slurm_without_an_address_meets_at_its_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    adopt(launched())
    assert os.environ["MASTER_ADDR"] == "node-2"
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 40_000
    assert os.environ["RANK"] == "3"


def test_mpi_on_several_nodes_without_an_address_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR to the first host"):
        adopt(Launched("Open MPI", 3, 4, 1, 2))
    monkeypatch.setenv("PMIX_NAMESPACE", "job-1")
    adopt(Launched("Open MPI", 1, 2, 1, 2))  # on one node there is one address only
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("port", ["0", "70000", "http"])
def test_invalid_master_port_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="MASTER_PORT is"):
        adopt(Launched("RANK", 0, 2, 0, 2))


@pytest.mark.parametrize(
    ("names", "first"),
    [("a", "a"), ("a,b", "a"), ("n[03-05,9]", "n03"), ("n[7],m", "n7"), ("r1n[2,4]-ib,x", "r1n2-ib"), ("", "")],
)
def test_first_host_of_a_node_list(names: str, first: str) -> None:
    assert first_host(names) == first


def test_a_process_that_is_shown_its_own_gpu_alone_keeps_its_place_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes LOCAL_RANK for a device, of which there is only number 0 (srun --gpus-per-task 1)."""
    monkeypatch.setattr(distributed, "_place", None)
    for name, value in OMPI.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.number_device(1)
    assert os.environ["LOCAL_RANK"] == "1"
    distributed.number_device(0)
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    assert distributed.local_rank() == 1


GROUPS = """
from dsdpo.engine.start import start_distributed
start_distributed(timeout_minutes=2)
import torch.distributed as dist
from dsdpo.engine.trial import check_with_deepspeed
from tests.engine.test_zero_config import policy
for stage in (2, 3):
    check_with_deepspeed(policy({"zero_optimization": {"stage": stage}}, world_size=1), source="ds.json", trains=True)
world = dist.distributed_c10d._world
groups = list(world.pg_map)
assert len(groups) > 1, "DeepSpeed has made no group of its own"
for group in groups:
    print(world.pg_names[group], group._get_backend(__import__("torch").device("cpu")).options._timeout, flush=True)
import os; os._exit(0)
"""


def test_time_limit_reaches_every_process_group() -> None:
    answer = finish([warm_python(), "-c", GROUPS], limit_s=LIMIT_S)
    assert answer.returncode == 0, answer.stderr
    limits = {line.split(" ", 1)[1] for line in answer.stdout.splitlines() if line}
    assert limits == {"0:02:00"}, answer.stdout


def test_taken_port_is_named(tmp_path: Path) -> None:
    code = "import sys; from dsdpo.engine.start import start_distributed as s; import dsdpo.__main__ as m\n"
    code += "import types, dsdpo.commands as c; f = types.ModuleType('f'); f.main = lambda a: s(timeout_minutes=1)\n"
    code += "sys.modules['dsdpo.commands.plot'] = f; sys.argv = ['dsdpo', 'plot']; m.entry()"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        answer = finish(
            [warm_python(), "-c", code], limit_s=LIMIT_S, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
    assert answer.returncode == 2, answer.stderr
    assert f"dsdpo: MASTER_PORT {port} is taken" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun did not start this process"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
    ],
)
def test_command_refuses_before_anything_is_read(variables: dict[str, str], word: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {path: ./none}\ndata: {train: none}\ndeepspeed: run.yaml\noutput_dir: out\n")
    answer = finish([*warm_dsdpo(), "train", str(run), "--dry-run"], limit_s=LIMIT_S, **variables)
    assert answer.returncode == 2
    assert answer.stderr.startswith("dsdpo: ")
    assert word in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
