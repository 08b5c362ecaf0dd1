"""dsdpo from Python: settings from anywhere, rows in memory, losses of one's own, and callbacks on ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

import dsdpo
from dsdpo import DsdpoError, Event, PairLogps, Run, register_loss, train
from dsdpo.config.loss import LOSSES
from dsdpo.objective.losses.registered import REGISTERED
from tests.commands.processes import environment_of
from tests.ranks import run_ranks
from tests.runs import settings

MINIMAL = {"model": {"path": "m"}, "data": {"train": "d"}, "deepspeed": "ds.json", "output_dir": "out"}
ROWS = [{"prompt": "what colour is the sun ?", "chosen": "yellow .", "rejected": f"{c} ."} for c in ("red", "blue")]


@pytest.fixture(autouse=True)
def _forget_losses() -> Iterator[None]:
    yield
    forget_losses()


def forget_losses() -> None:
    """Take the losses that were registered in this process away again."""
    for name in list(REGISTERED):
        del REGISTERED[name], LOSSES[name]


def test_importing_is_fast_and_says_nothing() -> None:
    code = "import sys, dsdpo; dsdpo.Run; assert 'torch' not in sys.modules, 'torch is imported'; print(dir(dsdpo))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment_of(), check=True
    )
    assert done.stderr == ""
    assert all(name in done.stdout for name in dsdpo.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dsdpo.no_such_name


def test_file_mapping_keywords_and_folder_give_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "loss": {"beta": 0.2, "label_smoothing": 0.1}}))
    run = Run(path, loss={"beta": 0.3})
    assert run.settings.loss.beta == 0.3
    assert run.settings.loss.label_smoothing == 0.1, "an override replaces a setting, not its section"
    assert run == Run(tmp_path, **{"loss.beta": 0.3})
    assert run == Run(loss={"beta": 0.3, "label_smoothing": 0.1}, **MINIMAL)
    assert run == Run(run.to_dict())
    assert run == Run(yaml.safe_load(run.to_yaml()))
    assert run.output_dir == Path("out")
    with pytest.raises(AttributeError, match="does not change"):
        run.source = "elsewhere"


def test_rows_and_deepspeed_configs_in_memory_become_files_named_by_content(tmp_path: Path) -> None:
    def run(train: Any, **data: Any) -> dict[str, Any]:
        given = {**MINIMAL, "data": {"train": train, "cache_dir": str(tmp_path), **data}}
        return Run(given, deepspeed={"zero_optimization": {"stage": 2}}).to_dict()

    listed = run(ROWS, eval={"one": ROWS[:1], "two": {"path": ROWS[1:], "weight": 2.0}})
    path = listed["data"]["train"][0]["path"]
    assert [json.loads(line) for line in Path(path).read_text().splitlines()] == ROWS
    assert [source["set"] for source in listed["data"]["eval"]] == ["one", "two"]
    assert run(datasets.Dataset.from_list(ROWS))["data"]["train"][0]["path"] == path
    assert run([{"path": ROWS, "columns": {"chosen": "rejected"}}, "other"])["data"]["train"][0]["path"] == path
    assert json.loads(Path(listed["deepspeed"]).read_text()) == {"zero_optimization": {"stage": 2}}


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (3, {}, "got a int: give a run file"),
    ("nowhere.yaml", {}, "nowhere.yaml"),
    (MINIMAL, {"loss": {"betta": 1}}, "Run(...): loss.betta is not a setting; did you mean loss.beta?"),
    (MINIMAL, {"loss.betta": 1}, "loss.betta is not a setting"),
    (MINIMAL, {"loss.beta": "high"}, "Run(...): loss.beta is 'high'"),
    ({**MINIMAL, 3: 4}, {}, "3 is no name of a setting"),
    (MINIMAL, {"loss": 1, "loss.beta": 2}, "loss.beta and loss are both given"),
    (MINIMAL, {"data": {"train": []}}, "data.train is []"),
    (MINIMAL, {"data": {"train": 5}}, "data.train is a int: give a path"),
    (MINIMAL, {"data": {"train": [ROWS[0], "text"]}}, "row 1 is a str: each row must be a dict"),
    (MINIMAL, {"data": {"train": [{**ROWS[0], "margin": float("nan")}]}}, "row 0 holds what JSON has no word for"),
    (MINIMAL, {"data": {"train": [{"chosen": object()}]}}, "row 0 holds what JSON has no word for"),
    (MINIMAL, {"data": {"train": datasets.DatasetDict()}}, "is a DatasetDict: give a datasets.Dataset"),
    (MINIMAL, {"deepspeed": {"zero_optimization": object()}}, "deepspeed holds what JSON has no word for"),
    (MINIMAL, {"loss.type": "mine"}, "loss.type is 'mine': input should be 'sigmoid'"),
    (MINIMAL, {"loss": {"options": {"target": 1}}}, "loss.options.target: loss.type sigmoid is of dsdpo"),
]


@pytest.mark.parametrize(("given", "overrides", "expected"), WRONG, ids=[case[2] for case in WRONG])
def test_wrong_settings_are_one_error(
    given: Any, overrides: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DsdpoError) as refused:
        Run(given, **overrides)
    assert expected in str(refused.value)


def test_a_registered_loss_takes_its_options_and_is_tried() -> None:
    @register_loss
    def squared(policy: PairLogps, reference: PairLogps, *, beta: float, target: float = 1.0) -> Any:
        return (beta * (policy.chosen - reference.chosen - policy.rejected + reference.rejected) - target) ** 2

    run = Run(MINIMAL, loss={"type": "squared", "options": {"target": 3}})
    assert run.settings.loss.describe() == "squared, beta 0.1, target 3"
    for options, expected in (({"goal": 1}, "takes target"), ({"target": "far"}, "give a float")):
        with pytest.raises(DsdpoError, match=expected):
            Run(MINIMAL, loss={"type": "squared", "options": options})


REFUSED = {
    "policy": lambda policy: policy,
    "neither one of": lambda policy, reference, weight: weight,
    "name each option": lambda policy, reference, **options: options,
}


@pytest.mark.parametrize("expected", REFUSED)
def test_a_loss_with_a_signature_that_cannot_be_called_is_refused(expected: str) -> None:
    with pytest.raises(DsdpoError, match=expected):
        register_loss(name="mine")(REFUSED[expected])


def test_a_loss_with_a_taken_name_is_refused() -> None:
    with pytest.raises(DsdpoError, match="sigmoid is a loss of dsdpo"):
        register_loss(name="sigmoid")(lambda policy, reference: policy.chosen)


USELESS = {
    "shape \\(\\) for 3 pairs": lambda policy, reference: policy.chosen.sum(),
    "no gradient": lambda policy, reference: policy.chosen.detach(),
    "must be finite": lambda policy, reference: policy.chosen.log(),
    "ZeroDivisionError": lambda policy, reference: 1 / 0,
}


@pytest.mark.parametrize("expected", USELESS)
def test_a_loss_that_cannot_be_trained_on_is_refused_before_a_model_loads(expected: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    register_loss(name="mine")(USELESS[expected])
    with pytest.raises(DsdpoError, match=expected):
        train(Run(MINIMAL, loss={"type": "mine"}, deepspeed=tmp_path / "ds.json"), quiet=True)


def train_with_callbacks(run: dict[str, Any]) -> dict[str, Any]:
    """On one of two ranks: a run with a loss of its own, then runs whose callbacks fail, and what came of each."""
    from dsdpo.distributed import rank

    @register_loss
    def shifted(policy: PairLogps, reference: PairLogps, *, beta: float, by: float = 0.0) -> Any:
        return by - beta * (policy.chosen - reference.chosen - policy.rejected + reference.rejected)

    seen: list[tuple[str, int, float]] = []

    def note(event: Event) -> None:
        seen.append((event.kind, event.step, event.metrics["loss" if event.kind == "step" else "eval/loss"]))
        event.metrics.clear()

    def fails(event: Event) -> None:
        raise ValueError(f"no step {event.step}")

    def stops(event: Event) -> None:
        if event.step == 2:
            event.stop()

    own = {"type": "shifted", "options": {"by": 2.0}}
    result = train(Run(run, loss=own), on_step=note, on_evaluate=note, on_save=[note], quiet=True)
    found: dict[str, Any] = {"seen": seen, "result": result}

    def outcome(name: str, **callbacks: Any) -> None:
        again = Run(run, loss=own, overwrite_output_dir=True)
        try:
            found[name] = train(again, quiet=True, **callbacks)
        except DsdpoError as error:
            found[name] = str(error)

    outcome("failed", on_step=fails)
    outcome("reported", on_step=[fails, note], callback_errors="report")
    outcome("stopped", on_step=stops)
    outcome("uneven", on_step=note if rank() == 0 else ())
    forget_losses()
    return found


def test_callbacks_run_on_rank_0_and_all_ranks_agree_on_their_failures(inputs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()[:40]]
    run = settings(
        tmp_path, inputs, policy_zero="zero2", reference_zero=None,
        data={"train": rows, "eval": rows[:4]}, checkpoint={"every_steps": 4},
    )  # fmt: skip
    main, other = run_ranks(2, train_with_callbacks, run)

    kinds = [(kind, step) for kind, step, _ in main["seen"][:7]]
    steps = [("step", 1), ("step", 2), ("step", 3), ("step", 4)]
    assert kinds == [("evaluate", 0), *steps, ("evaluate", 4), ("save", 4)]
    assert main["seen"][0][2] == pytest.approx(2.0, abs=1e-5), "policy and reference start alike: the loss is `by`"
    assert other["seen"] == []
    result = main["result"]
    assert result == other["result"]
    assert (result.step, result.stopped, len(result.metrics)) == (4, None, 4)
    assert result.metrics[0]["loss"] == pytest.approx(2.0, abs=1e-5), "a callback cannot change what is recorded"
    assert result.last_evaluation["eval/loss"] < 2.0
    assert result.model == result.output_dir / "model"
    assert [path.name for path in result.checkpoints] == ["step-000004"]

    for found in (main, other):
        assert "the callback train_with_callbacks.<locals>.fails failed after step 1" in found["failed"]
        assert "ValueError: no step 1 (rank 0)" in found["failed"]
        assert found["reported"].step == 4
        assert (found["stopped"].step, found["stopped"].model) == (2, None)
        assert found["stopped"].stopped.startswith("the file")
        assert "was given other callbacks than rank" in found["uneven"]
    assert [step for kind, step, _ in main["seen"][7:] if kind == "step"] == [1, 2, 3, 4]
