"""Hints: said when the numbers call for them, once, and not otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.config.loss import LossConfig
from dsdpo.config.run import RunConfig
from dsdpo.config.shipped import page
from dsdpo.data.dropped_rows import DropReport
from dsdpo.data.pairs import Pairs
from dsdpo.errors import ConfigError
from dsdpo.training.hints import PAGE, ROWS, Hints, contradictions
from dsdpo.training.patience import note_evaluation, out_of_patience

HEALTHY = {
    "loss": 0.6,
    "nll/chosen": 1.2,
    "rewards/chosen": 0.1,
    "rewards/rejected": -0.4,
    "rewards/margins": 0.5,
    "rewards/accuracies": 0.7,
    "rewards/accuracies_chosen_longer": 0.72,
    "rewards/accuracies_chosen_shorter": 0.68,
}


def heard(loss: LossConfig, first_step: int = 1, **changes: float) -> list[str]:
    """What is said over 30 rows of the same metrics, by name."""
    hints, lines = Hints(loss, said={}), []
    row = HEALTHY | {name.replace("__", "/"): value for name, value in changes.items()}
    for step in range(first_step, first_step + 3 * ROWS):
        lines += hints.of_row(step, row)
    assert all(f"See {page(PAGE)}#" in line for line in lines)
    return [line.split("#")[1] for line in lines]


@pytest.mark.parametrize(
    ("options", "first_step", "changes", "expected"),
    [
        ({}, 1, {}, []),
        ({}, 1, {"time/slowest_rank": 1.0, "perf/imbalance_s": 0.5, "time/step_s": 1.0}, ["straggler"]),
        ({}, 1, {"time/slowest_rank": 1.0, "perf/imbalance_s": 0.1, "time/step_s": 1.0}, []),
        ({}, 1, {"rewards__chosen": -0.6, "rewards__rejected": -1.5}, ["chosen-falls"]),
        ({"rpo_alpha": 1.0}, 1, {"rewards__chosen": -0.6, "rewards__rejected": -1.5}, []),
        ({"type": "dpop"}, 1, {"rewards__chosen": -0.6, "rewards__rejected": -1.5}, []),
        ({}, 1, {"rewards__margins": 20.0}, ["margin-explodes"]),
        ({"type": "sigmoid_norm"}, 1, {"rewards__margins": 20.0}, []),
        ({}, 1, {"rewards__accuracies": 0.5}, []),
        ({}, 100, {"rewards__accuracies": 0.5}, ["at-chance"]),
        ({}, 1, {"rewards/accuracies_chosen_longer": 0.9, "rewards/accuracies_chosen_shorter": 0.4}, ["length-bias"]),
        ({}, 1, {"nll__chosen": 4.0}, ["far-from-data"]),
        ({}, 2, {"nll__chosen": 4.0}, []),
        # 0.1 * (-100 + 400) nats: the policy finds 100 tokens likely, the reference does not.
        ({}, 1, {"rewards__chosen": 30.0, "logps__chosen": -100.0, "lengths__chosen": 100.0}, ["far-from-data"]),
        ({}, 1, {"rewards__chosen": 1.0, "logps__chosen": -100.0, "lengths__chosen": 100.0}, []),
        # Of a beta that has grown tenfold the rewards are a tenth of what they seem.
        ({}, 1, {"loss__beta": 1.0, "rewards__chosen": -0.6, "rewards__rejected": -1.5}, []),
    ],
)
def test_a_hint_is_said_once_where_the_metrics_call_for_it(
    options: dict[str, Any], first_step: int, changes: dict[str, float], expected: list[str]
) -> None:
    assert heard(LossConfig(**options), first_step, **changes) == expected


def test_a_resumed_run_does_not_repeat_its_hints() -> None:
    said: dict[str, float] = {}
    row = HEALTHY | {"nll/chosen": 4.0}
    assert len(Hints(LossConfig(), said).of_row(1, row)) == 1
    assert Hints(LossConfig(), dict(said)).of_row(1, row) == []


def test_every_hint_has_its_section_in_the_docs() -> None:
    source = Path(__file__).resolve().parents[2]
    names = {"chosen-falls", "margin-explodes", "at-chance", "length-bias", "far-from-data", "truncation", "duplicates",
             "contradictions", "straggler"}  # fmt: skip
    code = (source / "dsdpo" / "training" / "hints.py").read_text()
    assert all(f'"{name}"' in code for name in names)
    page = (source / "docs" / PAGE).read_text()
    assert {line[3:].strip() for line in page.splitlines() if line.startswith("## ")} == names


def test_pairs_with_swapped_labels_are_found() -> None:
    rows = [(1, 2, 3), (1, 3, 2), (4, 2, 3), (1, 2, 3), (5, 6, 7), (5, 7, 6)]
    pairs = Pairs(
        lengths=np.ones((len(rows), 3), dtype=np.int32),
        origins=np.zeros((len(rows), 2), dtype=np.int64),
        report=DropReport(rows=len(rows), kept=len(rows), problems=()),
        digest="",
        starts=3 * np.arange(len(rows)),
        tokens=np.array(rows, dtype=np.int32).ravel(),
    )
    # The second, the fourth (against the second) and the last.
    assert contradictions(pairs) == 3
    assert contradictions(pairs.subset(np.arange(2, 5))) == 0


def run(**evaluation: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t", "eval": "e"},
            "evaluation": {"every_steps": 10, **evaluation},
            "deepspeed": "d",
            "output_dir": "o",
        }
    )


def test_training_ends_after_as_many_evaluations_without_a_better_one() -> None:
    kept: dict[str, float] = {}
    settings = run(patience=2, metric="eval/rewards/accuracies")
    ended = []
    for accuracy in (0.5, 0.6, 0.55, 0.61, 0.61, 0.6, 0.7):
        note_evaluation(settings, kept, {"eval/rewards/accuracies": accuracy})
        ended.append(out_of_patience(settings, kept))
    assert ended == [False, False, False, False, False, True, False]
    assert not out_of_patience(run(), kept)


def test_a_metric_that_no_evaluation_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.metric eval/accuracy is no metric.*eval/loss"):
        note_evaluation(run(patience=2, metric="eval/accuracy"), {}, {"eval/loss": 1.0})
