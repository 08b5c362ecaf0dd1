"""Ranks that were started with different things: one message that names hosts and field, exit code 2 on all of them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import dsdpo
from tests.commands.processes import environment_of, finish, free_port
from tests.ranks import run_ranks
from tests.runs import POLICIES, settings, write_json
from tests.warm import warm_dsdpo

LIMIT_S = 600
HERE = socket.gethostname()


def refusal(runs: list[dict[str, Any]]) -> str:
    """What plan_run says on this rank of its own run."""
    from dsdpo.config.run import RunConfig
    from dsdpo.distributed import rank
    from dsdpo.errors import ConfigError
    from dsdpo.run.plan import plan_run

    try:
        plan_run(RunConfig.model_validate(runs[rank()]), writes_output=False)
    except ConfigError as error:
        return str(error)
    return ""


def other_model(folder: Path, inputs: Path, **changes: Any) -> str:
    """A copy of the model whose config.json says something else."""
    shutil.copytree(inputs / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_each_difference_is_named_by_host_and_field(inputs: Path, tmp_path: Path) -> None:
    """All in one pair of runs, which have nothing but their data in common."""
    run = settings(tmp_path, inputs, reference_zero=None)
    jinja = tmp_path / "other.jinja"
    jinja.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    other = settings(
        tmp_path, inputs, reference_zero=None,
        loss={"beta": 0.7}, batch={"pairs_per_step": 4}, optimizer={"learning_rate": 5e-3},
        model={"path": other_model(tmp_path / "model", inputs, rms_norm_eps=1e-3), "chat_template": str(jinja)},
        distributed={"timeout_minutes": 7},
    )  # fmt: skip
    json_of_rank_1 = {"zero_optimization": {**POLICIES["zero3"]["zero_optimization"], "sub_group_size": 77}}
    other["deepspeed"] = write_json(tmp_path / "other.json", json_of_rank_1)
    said = run_ranks(2, refusal, [run, other])
    assert said[0] == said[1]
    for line in (
        f"loss.beta: 0.1 on {HERE} (rank 0), 0.7 on {HERE} (rank 1)",
        f"batch.pairs_per_step: 8 on {HERE} (rank 0), 4 on {HERE} (rank 1)",
        f"optimizer.learning_rate: 0.001 on {HERE} (rank 0), 0.005 on {HERE} (rank 1)",
        f"config.json of model.path: rms_norm_eps: 1e-06 on {HERE} (rank 0), 0.001 on {HERE} (rank 1)",
        f"zero_optimization.sub_group_size: nothing on {HERE} (rank 0), 77 on {HERE} (rank 1)",
        "chat template (digest): ",
    ):
        assert line in said[0]
    assert "timeout_minutes" not in said[0], "it changes no number"


def test_what_rank_1_alone_cannot_read_is_told_with_its_host(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, reference_zero=None)
    said = run_ranks(2, refusal, [run, {**run, "model": {**run["model"], "path": str(tmp_path / "none")}}])
    assert f"model.path: no folder {tmp_path / 'none'}" in said[0]
    assert said[0].endswith(f"(rank 1 on {HERE})")


def differences_here(clocks: list[float]) -> tuple[list[str], list[str]]:
    from dsdpo.distributed import learn_hosts
    from dsdpo.run.agreement import differences, skew

    learn_hosts()
    facts: list[dict[str, Any]] = [{"a": [1], "b": "x" * 90}, {"a": [1], "b": "x" * 91}]
    return list(differences(facts)), list(skew(clocks))


def test_long_values_stay_different_and_clocks_are_compared() -> None:
    [(lines, skewed), _] = run_ranks(2, differences_here, [100.0, 88.0])
    assert len(lines) == 1
    assert lines[0].count("xxx... (") == 2
    assert skewed == [f"clocks: {HERE} (rank 0) is 12 s ahead of {HERE} (rank 1)"]
    [(_, none), _] = run_ranks(2, differences_here, [100.0, 99.0])
    assert none == []


def both(folder: Path, files: list[Path], **rank_1: str) -> list[tuple[int, str]]:
    """Two ranks as on two nodes, each with a run file, the second with own variables; exit codes, words."""
    port, processes = str(free_port()), []
    for rank, path in enumerate(files):
        who = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [*warm_dsdpo(), "train", str(path), "--dry-run"]
        env = environment_of(**who, **where, **(rank_1 if rank else {}))
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=folder))
    return [(process.wait(LIMIT_S), process.communicate()[1]) for process in processes]


def written(path: Path, run: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(run))
    return path


def test_other_code_on_one_node_ends_both_with_one_message(inputs: Path, tmp_path: Path) -> None:
    """Code of the same version in which the loss is another one."""
    copy = tmp_path / "code" / "dsdpo"
    shutil.copytree(Path(dsdpo.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    losses = copy / "objective" / "losses" / "margins.py"
    losses.write_text(losses.read_text() + "\nBETA_TIMES = 2\n")
    path = written(tmp_path / "run.yaml", settings(tmp_path, inputs, reference_zero=None))
    (code, said), (other, silent) = both(tmp_path, [path, path], PYTHONPATH=str(copy.parent))
    assert (code, other) == (2, 2), said + silent
    assert said.count("dsdpo: ") == 1
    message = said[said.index("dsdpo: ") :]
    assert message.startswith("dsdpo: ranks were started with different things")
    assert f"dsdpo's code: {dsdpo.__version__}, digest " in message
    assert f"on {HERE} (rank 0), {dsdpo.__version__}, digest " in message
    assert len(message.splitlines()) == 3
    assert "dsdpo" not in silent


def test_other_data_on_one_node_ends_both_and_names_the_hosts(inputs: Path, tmp_path: Path) -> None:
    """A file of the same name with a row less."""
    runs = []
    for node, rows in enumerate((40, 39)):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        lines = (inputs / "train.jsonl").read_text().splitlines(keepends=True)[:rows]
        (folder / "train.jsonl").write_text("".join(lines))
        data = {"train": str(folder / "train.jsonl")}
        runs.append(written(folder / "run.yaml", settings(tmp_path, inputs, reference_zero=None, data=data)))
    (code, said), (other, silent) = both(tmp_path, runs)
    assert (code, other) == (2, 2), said + silent
    assert said.count("dsdpo: ") == 1
    assert "data.train" in said
    assert f"{HERE} (rank 0)" in said
    assert f"{HERE} (rank 1)" in said


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_typing_error_in_one_nodes_run_file_reaches_both(wrong: int, inputs: Path, tmp_path: Path) -> None:
    """Found before torch is imported, and yet the other rank need not wait for it in vain."""
    run = settings(tmp_path, inputs, reference_zero=None)
    files = [written(tmp_path / f"{rank}.yaml", run | ({"los": {}} if rank == wrong else {})) for rank in range(2)]
    answers = both(tmp_path, files)
    assert [code for code, _ in answers] == [2, 2], answers
    assert [said.count("los is not a setting") for _, said in answers] == [1, 0]
    assert (f"(rank 1 on {HERE})" in answers[0][1]) == (wrong == 1)


def test_a_rank_that_never_comes_is_named(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, reference_zero=None, distributed={"timeout_minutes": 0.1})
    path = written(tmp_path / "run.yaml", run)
    who = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [*warm_dsdpo(), "train", str(path)]
    answer = finish(command, limit_s=LIMIT_S, MASTER_PORT=str(free_port()), **who)
    assert answer.returncode == 1
    assert f"dsdpo: ranks 1-2 of 3 ranks did not come, only {HERE} (rank 0)" in answer.stderr
    assert "Traceback" not in answer.stderr
