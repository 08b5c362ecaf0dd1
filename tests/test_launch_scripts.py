"""The start scripts of launch/, with programs in PATH that write down how they were called in place of Slurm's.

What they do on real hosts and under a real Slurm is in tests/cluster.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
CALLED = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
"""
LEFT = "1-02:03:04"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH: srun ends with $SRUN_CODE, squeue says what is left of the job's time."""
    folder = tmp_path / "bin"
    folder.mkdir()
    endings = {"srun": "exit $SRUN_CODE", "squeue": f"echo {LEFT}", "scontrol": "", "scancel": ""}
    for name, ending in endings.items():
        (folder / name).write_text(CALLED + ending + "\n")
        (folder / name).chmod(0o755)
    return folder


def run(script: str, *words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a script said and its exit code, in `folder`."""
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "USER": "someone", **environment}
    command = ["bash", str(LAUNCH / script), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def job(programs: Path, *words: str, code: int, **environment: str) -> tuple[int, list[str]]:
    """The exit code of launch/slurm.sbatch whose srun ends with `code`, and what it called, in order."""
    calls = programs.parent / "calls"
    calls.unlink(missing_ok=True)
    path = f"{programs}:{os.environ['PATH']}"
    inside = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SRUN_CODE": str(code), "CALLS": str(calls)}
    done = run("slurm.sbatch", *words, folder=programs.parent, PATH=path, **inside, **environment)
    return done.returncode, [line for line in calls.read_text().splitlines() if not line.startswith("squeue")]


def test_only_a_job_that_stopped_and_saved_goes_back_into_the_queue(programs: Path) -> None:
    code, calls = job(programs, "train", "RUN.yaml", code=75)
    assert code == 75
    assert calls[1:] == ["scontrol requeue 7"]
    for code in (0, 1, 2, 137, 143):
        ended, calls = job(programs, "train", "RUN.yaml", code=code)
        assert (ended, len(calls)) == (code, 1)


def test_array_goes_on_with_its_next_job_until_the_run_is_done(programs: Path) -> None:
    ends = {code: job(programs, "train", "RUN.yaml", code=code, SLURM_ARRAY_JOB_ID="5") for code in (75, 1, 0, 2)}
    assert {code: ended for code, (ended, _) in ends.items()} == {75: 0, 1: 1, 0: 0, 2: 2}
    assert [calls[1:] for _, calls in ends.values()] == [[], [], *[["scancel --state=PENDING 5"]] * 2]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("train RUN.yaml", f"train RUN.yaml --checkpoint.time_limit {LEFT} --resume auto"),
        ("RUN.yaml", f"train RUN.yaml --checkpoint.time_limit {LEFT} --resume auto"),
        ("train RUN.yaml --resume=none", f"train RUN.yaml --resume=none --checkpoint.time_limit {LEFT}"),
        ("train RUN.yaml --checkpoint.time_limit 60", "train RUN.yaml --checkpoint.time_limit 60 --resume auto"),
        ("precompute RUN.yaml", f"precompute RUN.yaml --checkpoint.time_limit {LEFT}"),
        ("prepare RUN.yaml", "prepare RUN.yaml"),
    ],
)
def test_what_each_command_is_given(programs: Path, words: str, given: str) -> None:
    _, calls = job(programs, *words.split(), code=0)
    assert calls[0].endswith(f" dsdpo {given}")
    assert ("--ntasks 3 --ntasks-per-node 1" in calls[0]) == (given == "prepare RUN.yaml")
    assert "--kill-on-bad-exit=0" in calls[0]


def test_job_without_an_end_is_given_none(programs: Path) -> None:
    (programs / "squeue").write_text("#!/bin/sh\necho UNLIMITED\n")
    _, calls = job(programs, "train", "RUN.yaml", code=0)
    assert calls[0].endswith(" dsdpo train RUN.yaml --resume auto")


@pytest.mark.parametrize(
    ("words", "files", "said"),
    [
        ((), {}, "launch/multi_node.sh train RUN.yaml"),
        (("train", "RUN.yaml"), {}, "no hostfile: copy launch/hostfile.example"),
        (("RUN.yaml",), {"hostfile": "a slots=1\n", ".deepspeed_env": "A=1\n\n# b\n"}, "2:\n3:# b\n.deepspeed_env: "),
    ],
)
def test_multi_node_says_what_is_missing(
    tmp_path: Path, words: tuple[str, ...], files: dict[str, str], said: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = run("multi_node.sh", *words, folder=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
