"""`dsdpo compare`: trials that fit, run out of memory or are refused are rows; finished runs stand side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.__main__ import main
from dsdpo.commands.arguments import CompareArguments, compare
from dsdpo.config.load import load_run, run_parser
from dsdpo.config.run import RunConfig
from dsdpo.run import side_by_side
from dsdpo.run.series import load_series
from dsdpo.run.trial import speed_of, trial_settings
from dsdpo.run.trial_process import how_it_failed
from tests.commands.processes import finish
from tests.commands.test_report import write_run
from tests.runs import POLICIES, settings, write_json
from tests.warm import warm_dsdpo

LIMIT_S = 400


def write_run_file(folder: Path, inputs: Path, **sections: Any) -> Path:
    """A run over the demo's model, ready for `dsdpo compare`."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(folder, inputs, reference_zero=None, **sections)))
    return path


def test_out_of_memory_and_refusals_are_rows_and_the_best_is_suggested(inputs: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, inputs, train={"max_steps": 400}, checkpoint={"every_steps": 1})
    fits = write_json(tmp_path / "zero2.json", POLICIES["zero2"])
    # A reduce bucket that no machine has: DeepSpeed allocates it once the model is there.
    wide = {**POLICIES["zero3"]["zero_optimization"], "reduce_bucket_size": int(1e15)}
    huge = write_json(tmp_path / "huge.json", {"zero_optimization": wide})
    stage0 = write_json(tmp_path / "stage0.json", {"zero_optimization": {"stage": 0}})
    words = ["compare", str(run_file), "--zero", huge, stage0, fits, "--steps", "2", "--ranks", "2", "--json"]
    answer = finish([*warm_dsdpo(), *words, "--keep", str(tmp_path / "kept")], limit_s=LIMIT_S, cwd=tmp_path)
    assert answer.returncode == 0
    found = json.loads(answer.stdout)
    rows = {Path(row["policy"]).stem: row for row in found["rows"]}
    assert {name: row["ended"] for name, row in rows.items()} == {
        "huge": "no, host memory", "stage0": "refused", "zero2": "yes",
    }  # fmt: skip
    assert "allocate memory" in rows["huge"]["reason"]
    assert "one step late" in rows["stage0"]["reason"]
    best = rows["zero2"]
    assert best["device_bytes"] > 2**28
    assert best["device_bytes"] < best["host_bytes"] <= 2 * best["device_bytes"]  # of two ranks
    assert best["pairs_per_second"] == pytest.approx(8 / best["seconds"])
    assert best["gathers"] == 0
    assert best["estimate"]["host_bytes"] == pytest.approx(2 * best["estimate"]["device_bytes"])
    assert found["best"] == [fits, None]
    suggested = tmp_path / "run.suggested.yaml"
    assert yaml.safe_load(suggested.read_text()) == {"deepspeed": fits}
    assert "2 steps on 2 x cpu" in suggested.read_text()
    kept = {str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*")}
    assert "trial-3/run/metrics.jsonl" in kept
    assert not any("model" in path or "step-" in path for path in kept), "a trial saved or exported something"
    assert not (tmp_path / "run").exists(), "the run's own folder"


def test_a_trial_is_the_run_without_what_is_no_step(inputs: Path, tmp_path: Path) -> None:
    whole = {
        "evaluation": {"every_steps": 2, "patience": 3},
        "checkpoint": {"every_steps": 2, "keep_best": 1, "resume": "auto", "time_limit": 60},
        "export": {"which": "best", "push_to_hub": "user/name"},
        "tracking": {"tensorboard": True, "names": "trl", "every_steps": 50},
        "data": {"eval": str(inputs / "test.jsonl")},
        "reference": {"strategy": "precomputed"},
        "loss": {"beta": 0.3},
    }
    run_file = write_run_file(tmp_path, inputs, **whole)
    run, _ = load_run([str(run_file)], run_parser("test", ""))
    made = trial_settings(run, tmp_path / "t", policy="p.json", reference="r.json", steps=3, run_file=run_file)
    assert (made.train.max_steps, made.data.eval, made.checkpoint.every_steps) == (3, None, 0)
    assert (made.checkpoint.resume, made.evaluation.patience, made.export.push_to_hub) == (None, None, None)
    assert (made.deepspeed, made.reference.deepspeed, made.tracking.every_steps) == ("p.json", "r.json", 1)
    assert (made.output_dir, made.reference.store) == (str(tmp_path / "t/run"), str(tmp_path / "t/store"))
    assert (made.loss, made.batch, made.model) == (run.loss, run.batch, run.model)
    assert RunConfig.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("code", "said", "killed", "ended", "reason"),
    [
        (1, "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False,
         "no, device memory", "Tried to allocate 2 GiB"),
        (1, "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried",
         False, "no, host memory", "DefaultCPUAllocator"),
        (247, "loading", False, "no, host memory", "SIGKILL"),
        (1, "dsdpo (rank 0 on a): rank 1 on a is gone", True, "no, host memory", "the kernel killed"),
        (2, "noise\ndsdpo: zero3.json: stage 4 is none\nmore", False, "refused", "zero3.json: stage 4 is none"),
        (1, "Traceback\nValueError: odd\nCalledProcessError", False, "failed", "exit code 1: ValueError: odd"),
        (1, "", False, "failed", "it said nothing"),
    ],
)  # fmt: skip
def test_how_a_trial_failed(code: int, said: str, killed: bool, ended: str, reason: str) -> None:
    found = how_it_failed(code, said, killed=killed)
    assert found.ended == ended
    assert reason in found.reason
    assert not found.fits


def test_speed_is_that_of_the_middle_step() -> None:
    rows = [{"time/step_s": s, "perf/pairs_per_s": 8 / s, "comm/gathers": 5.0} for s in (1.0, 9.0, 2.0)]
    assert speed_of(rows) == (2.0, 4.0, 5.0)


def test_finished_runs_side_by_side(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, inputs, beta=beta, scale=scale)
            for name, beta, scale in (("a", 0.1, 1.0), ("b", 0.3, 2.0))]  # fmt: skip
    assert main(["compare", *map(str, runs)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["a/run", "b/run"]
    assert ["loss.beta", "0.1", "0.3"] in lines
    assert ["loss", "0.1", "0.2"] in lines
    assert ["perf/pairs_per_s", "9", "9"] in lines
    assert ["memory/peak_gib", "1.5", "1.5"] in lines
    assert not any(line[:1] == ["output_dir"] for line in lines)
    series = load_series(runs)
    wide, narrow = (side_by_side.table(series, width=width).splitlines() for width in (200, 70))
    assert max(map(len, wide)) > 70 >= max(map(len, narrow)), "a table that a terminal would break"
    assert main(["compare", "--json", str(runs[0]), str(runs[1] / "config.yaml")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held-out, last"]["loss"] == [pytest.approx(0.11), pytest.approx(0.21)]
    assert found["settings that differ"]["loss.beta"] == [0.1, 0.3]


def test_the_form_is_decided_by_what_is_given(inputs: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, inputs)
    given = compare([str(run_file), "--reference-zero", str(tmp_path / "policy.json"), "--loss.beta", "0.2"])
    assert isinstance(given, CompareArguments)
    assert (given.run.loss.beta, given.steps, given.out) == (0.2, 5, Path("run.suggested.yaml"))


WRONG = {
    "one finished run": (("{run}",), "two or more"),
    "no run": (("{folder}", "{folder}"), "metrics.jsonl"),
    "one step": (("{file}", "--steps", "1"), "--steps is 1"),
    "no ranks": (("{file}", "--ranks", "0"), "--ranks is 0"),
    "no time": (("{file}", "--limit", "0"), "--limit is 0"),
    "no such JSON": (("{file}", "--zero", "nowhere.json"), "--zero: no file nowhere.json"),
    "output in no folder": (("{file}", "--out", "{folder}/no/where.yaml"), "--out"),
    "output over the run file": (("{file}", "--out", "{file}"), "the run file itself"),
    "folder to keep that is in use": (("{file}", "--keep", "{folder}"), "--keep"),
    "no data": (("{file}", "--data.train", "./nowhere.jsonl"), "nowhere.jsonl"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, mention = WRONG[name]
    run_file = write_run_file(tmp_path, inputs)
    places = {"file": run_file, "folder": tmp_path, "run": write_run(tmp_path / "done", inputs, beta=0.1, scale=1.0)}
    assert main(["compare", *(word.format(**places) for word in words)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("dsdpo: ")
    assert mention in errors
