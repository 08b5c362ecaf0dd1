"""Held-out sets and what goes by their metrics: how they are written, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dsdpo.config.data import DataConfig
from dsdpo.config.run import CheckpointConfig, EvaluationConfig, RunConfig
from dsdpo.training.checkpoint import sign
from dsdpo.training.groups import bucket_names, source_names


def test_a_mapping_names_held_out_sets() -> None:
    data = DataConfig.model_validate(
        {"train": "t", "eval": {"a": "a.jsonl", "b": ["b.jsonl", {"path": "c", "split": "x"}]}}
    )
    assert data.eval is not None
    assert [(source.set, source.path, source.split) for source in data.eval] == [
        ("a", "a.jsonl", None), ("b", "b.jsonl", None), ("b", "c", "x"),
    ]  # fmt: skip
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data
    one = DataConfig.model_validate({"train": "t", "eval": {"path": "c", "split": "x"}})
    assert one.eval is not None
    assert [source.set for source in one.eval] == [None]


def run(**sections: Any) -> RunConfig:
    base = {"model": {"path": "m"}, "data": {"train": "t"}, "deepspeed": "d", "output_dir": "o"}
    return RunConfig.model_validate({**base, **sections})


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": {"train": {"path": "t", "set": "a"}}}, ["data.train", "set a", "data.eval only"]),
        ({"data": {"train": "t", "eval": {"length": "e"}}}, ["'length' is no name"]),
        ({"data": {"train": "t", "eval": {"a/b": "e"}}}, ["'a/b' is no name"]),
        ({"evaluation": {"length_buckets": [512, 256]}}, ["length_buckets", "ascend"]),
        ({"evaluation": {"patience": 3, "every_steps": 0}}, ["evaluation.patience 3", "every_steps 0"]),
        ({"evaluation": {"metric": "eval/nll/chosen"}}, ["evaluation.metric eval/nll/chosen", "patience"]),
        ({"evaluation": {"patience": 3}}, ["evaluation.patience 3", "data.eval"]),
        ({"checkpoint": {"best_metric": "accuracy"}}, ["best_metric"]),
        ({"export": {"which": "best"}}, ["export.which best", "keep_best"]),
    ],
)
def test_contradictory_evaluation_settings_are_refused(sections: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        run(**sections)
    for text in expected:
        assert text in str(refused.value)


def test_which_way_is_better_follows_from_the_metric() -> None:
    lower = ["eval/loss", "eval/loss/sft", "eval/a/nll/chosen", "eval/perplexity/chosen", "eval/rewards/ties"]
    assert all(sign(name) == 1.0 for name in lower)
    assert all(
        sign(name) == -1.0 for name in ("eval/rewards/accuracies", "eval/a/rewards/margins", "eval/rewards/chosen")
    )
    assert (EvaluationConfig().metric, CheckpointConfig().best_metric) == ("eval/loss", "eval/loss")


def test_groups_are_named_shortly_and_apart() -> None:
    data = DataConfig.model_validate(
        {
            "train": [
                "x/a.jsonl",
                "y/a.jsonl",
                {"path": "hub/b", "split": "one"},
                {"path": "hub/b", "split": "two"},
                "c.jsonl",
            ]
        }
    )
    assert source_names(data.train) == ["a-0", "a-1", "b-one", "b-two", "c"]
    assert bucket_names([256, 1024]) == ["1-256", "257-1024", "1025-"]
