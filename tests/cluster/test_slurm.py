"""launch/slurm.sbatch under a real Slurm on two hosts: stopped, requeued, resumed, and every command by one script."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Project, need
from tests.cluster.hosts import PACKAGES, ROOT, Hosts, environment_of_hosts, wait_until
from tests.cluster.slurm import PACKAGES as SLURM_PACKAGES
from tests.cluster.slurm import Slurm
from tests.runs import losses, metrics, train_on

LIMIT_S = 600
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60"]
SCRIPT = str(ROOT / "launch" / "slurm.sbatch")
STOPS = 10
LAST_STEP = 60
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts, for Slurm alone."""
    need(PACKAGES | SLURM_PACKAGES)
    with Hosts(2) as started:
        yield started


@pytest.fixture(scope="module")
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    with Slurm(hosts) as started:
        yield started


@contextmanager
def busy_machine() -> Iterator[None]:
    """As many processes that compute as there are cores, beside the run's."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin, env=environment_of_hosts()) for _ in range(2)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps_of(folder: Path) -> list[float]:
    """The steps in metrics.jsonl, which may not be there yet."""
    return [row["step"] for row in metrics(folder)] if (folder / "metrics.jsonl").exists() else []


def has_trained(slurm: Slurm, job: str, folder: Path, steps: int) -> bool:
    """Whether more steps than these have been taken; fails if the job has ended instead."""
    state = slurm.job(job)
    assert state["JobState"] not in ENDED, f"lost: {state}"
    return len(steps_of(folder)) > steps


def requeued(slurm: Slurm, job: str, times: int) -> bool:
    """Whether the job waits for its next start; fails if it has ended instead."""
    state = slurm.job(job)
    assert state["JobState"] not in ENDED, f"lost after {times - 1} requeues: {state}"
    return state["JobState"] == "PENDING" and int(state["Restarts"]) == times


def test_stopped_requeued_and_resumed_ten_times_under_load(slurm: Slurm, project: Project) -> None:
    """Each start trains one step; none is lost, and the losses are those of a run that was left alone."""
    settings = {"train": {"max_steps": STOPS + 1}}
    run_file, folder = project.write("stops", **settings), project.run_folder("stops")
    words = [SCRIPT, "train", run_file.name, "--checkpoint.deadline", "1"]  # over when the first step is
    job = slurm.submit([*TWO_NODES, *words], folder=project.folder)
    log = project.folder / f"dsdpo-{job}.log"
    with busy_machine():
        for stop in range(1, STOPS + 1):
            wait_until(partial(requeued, slurm, job, stop), limit_s=LIMIT_S, what=f"requeue {stop}")
            print(f"stop {stop} after step {steps_of(folder)[-1]}", flush=True)
            # Slurm would wait two minutes. At once is too early: it revokes credentials by the second.
            slurm.tell("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
        ended = slurm.wait(job, *ENDED, limit_s=LIMIT_S)
    print(log.read_text())
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(STOPS))
    assert log.read_text().count("by checkpoint.deadline; everything is saved") == STOPS
    assert steps_of(folder) == list(range(1, STOPS + 2))
    alone = yaml.safe_load(project.write("alone", **settings).read_text())
    assert losses(metrics(folder)) == losses(train_on(2, alone))


def test_stops_by_itself_before_the_end_of_its_time(slurm: Slurm, project: Project) -> None:
    """A job of three minutes: not enough for two saves of two minutes, which is what one is taken to last."""
    run_file = project.write("short", train={"max_steps": LAST_STEP})
    words = [*TWO_NODES, "--time=3", SCRIPT, "train", run_file.name]
    job = slurm.submit(words, folder=project.folder)
    wait_until(partial(requeued, slurm, job, 1), limit_s=LIMIT_S, what="a requeue")
    slurm.tell("scancel", job)
    assert "by checkpoint.time_limit; everything is saved" in (project.folder / f"dsdpo-{job}.log").read_text()
    assert (project.run_folder("short") / "checkpoints").is_dir()


def test_a_killed_rank_ends_the_job_and_is_named(hosts: Hosts, slurm: Slurm, project: Project) -> None:
    run_file = project.write("killed", train={"max_steps": 500})
    folder = project.run_folder("killed")
    job = slurm.submit([*TWO_NODES, SCRIPT, "train", run_file.name], folder=project.folder)
    wait_until(partial(has_trained, slurm, job, folder, 1), limit_s=LIMIT_S, what="two steps")
    (rank,) = hosts.processes("node-2", "dsdpo train", run_file.name, "--resume", "python")
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(rank)], check=True)
    seconds = wait_until(lambda: slurm.job(job)["JobState"] in ENDED, limit_s=120, what="the end of the job")
    said = (project.folder / f"dsdpo-{job}.log").read_text()
    print(f"ended after {seconds:.1f} s\n{said}")
    assert slurm.job(job)["JobState"] == "FAILED"
    assert "rank 1 (node-2" in said


def test_other_commands_by_the_same_script(slurm: Slurm, project: Project) -> None:
    """prepare runs once a node, precompute and evaluate share the pairs out, and training finds every score."""
    store = str(project.folder / "store")
    run_file = project.write("scored", reference={"strategy": "precomputed", "store": store})
    evaluate = ["evaluate", str(project.run_folder("scored")), "--data", str(project.inputs / "test.jsonl")]
    said = {}
    for words in (["prepare", run_file.name], ["precompute", run_file.name], ["train", run_file.name], evaluate):
        job = slurm.submit([*TWO_NODES, SCRIPT, *words], folder=project.folder)
        ended = slurm.wait(job, *ENDED, limit_s=LIMIT_S)
        said[words[0]] = (project.folder / f"dsdpo-{job}.log").read_text()
        print(said[words[0]])
        assert ended["JobState"] == "COMPLETED"
    assert "takes it from there" in said["prepare"]
    assert "takes it from there" in said["precompute"]
    assert "reference on train data: 1,728 pairs, 1,728 known" in said["train"]
    assert "0 scored" in said["train"]
    assert "rewards/accuracies" in said["evaluate"]


def test_array_goes_on_where_jobs_may_not_requeue(slurm: Slurm, project: Project) -> None:
    """The first job of the array stops, the second goes on to the end, and the others are not needed."""
    run_file = project.write("array", train={"max_steps": LAST_STEP})
    folder = project.run_folder("array")
    words = [*TWO_NODES, "--no-requeue", "--array=1-4%1", "--output=array-%a.log", SCRIPT, "train", run_file.name]
    array = slurm.submit(words, folder=project.folder)
    wait_until(partial(has_trained, slurm, f"{array}_1", folder, 0), limit_s=LIMIT_S, what="a step")
    slurm.signal(slurm.job(f"{array}_1")["JobId"], "USR1")
    slurm.wait(f"{array}_2", "COMPLETED", "FAILED", limit_s=LIMIT_S)
    wait_until(lambda: not slurm.tell("squeue", "--noheader"), limit_s=60, what="no job of the array left")
    assert not (project.folder / "array-3.log").exists()
    said = [(project.folder / f"array-{number}.log").read_text() for number in (1, 2)]
    assert "stopped after step" in said[0]
    assert "resumed from" in said[1]
    assert [slurm.job(f"{array}_{number}")["JobState"] for number in (1, 2)] == ["COMPLETED"] * 2
    assert steps_of(folder) == list(range(1, LAST_STEP + 1))
