"""`dsdpo doctor`: findings about every node and what is between them, what would stop a run first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from tests.commands.processes import finish
from tests.ranks import run_ranks
from tests.runs import settings
from tests.warm import warm_dsdpo

LIMIT_S = 300


def examined(runs: list[dict[str, Any]], local_ranks: list[int]) -> list[dict[str, str]]:
    """All findings, with this rank in that place of its node."""
    from dataclasses import asdict

    from dsdpo.config.run import RunConfig
    from dsdpo.distributed import rank
    from dsdpo.run.examination import examine

    before = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(local_ranks[rank()])
    try:
        return [asdict(finding) for finding in examine(RunConfig.model_validate(runs[rank()]), Path("run.yaml"))]
    finally:
        os.environ["LOCAL_RANK"] = before


def test_two_nodes_that_differ(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, reference_zero=None)
    same, other = run_ranks(2, examined, [run, {**run, "loss": {"beta": 0.7}}], [0, 0])
    assert same == other
    found = {finding["what"]: finding for finding in same}
    assert found["the run"]["level"] == "red"
    assert "loss.beta: 0.1 on" in found["the run"]["value"]
    links = found["all-reduce and all-gather between nodes"]
    assert links["value"].startswith("latency ")
    assert "16 MiB at" in links["value"]
    assert found["sharing of output_dir"]["value"] == "one disk for all ranks"
    assert {"versions", "devices", "host memory", "clock", "disk of output_dir", "open files"} <= found.keys()


def test_one_node_that_is_sound(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, policy_zero="zero3_offload", reference_zero=None)
    [findings, _] = run_ranks(2, examined, [run, run], [0, 1])
    found = {finding["what"]: finding for finding in findings}
    assert not [finding for finding in findings if finding["level"] == "red"]
    assert "all-reduce and all-gather within nodes" in found
    assert "all-reduce and all-gather between nodes" not in found
    assert found["operator cpu_adam"]["level"] == "ok"


def test_what_stops_a_run_comes_first_and_ends_with_1(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, reference_zero=None)
    run["model"]["path"] = str(tmp_path / "nowhere")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    answer = finish([*warm_dsdpo(), "doctor", str(path)], limit_s=LIMIT_S)
    assert answer.returncode == 1
    lines = answer.stdout.splitlines()
    assert lines[0].startswith(f"  STOP  the run: model.path: no folder {tmp_path / 'nowhere'}")
    assert [line[:6].strip() for line in lines[:-1]] == sorted(
        (line[:6].strip() for line in lines[:-1]), key=["STOP", "look", "ok"].index
    )
    assert lines[-1] == "1 thing would stop a run here"


def test_as_json_without_a_run() -> None:
    answer = finish([*warm_dsdpo(), "doctor", "--json"], limit_s=LIMIT_S)
    findings = json.loads(answer.stdout)
    assert {"level", "what", "value", "remedy", "where"} == findings[0].keys()
    assert answer.returncode == int(any(finding["level"] == "red" for finding in findings))
    assert "dsdpo" in next(finding["value"] for finding in findings if finding["what"] == "versions")
