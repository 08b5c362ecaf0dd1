"""Held-out metrics: every pair once, whatever the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import metrics, settings, train_on
from tests.tiny import plain_logps

PAIRS = 13  # a prime: no number of ranks or micro-batches divides it


@pytest.fixture(scope="module")
def held_out(inputs: Path) -> Path:
    path = inputs / "held_out.jsonl"
    path.write_text("".join((inputs / "test.jsonl").read_text().splitlines(keepends=True)[:PAIRS]))
    return path


def test_every_pair_counts_once_on_any_number_of_ranks(inputs: Path, held_out: Path, tmp_path: Path) -> None:
    lines = held_out.read_text().splitlines(keepends=True)
    sets = {"seven": [tmp_path / "seven.jsonl"], "rest": [tmp_path / "four.jsonl", tmp_path / "two.jsonl"]}
    for path, part in zip([*sets["seven"], *sets["rest"]], (lines[:7], lines[7:11], lines[11:]), strict=True):
        path.write_text("".join(part))
    found = {}
    for world_size in (1, 2):
        run = settings(
            tmp_path / str(world_size),
            inputs,
            data={"eval": {name: [str(path) for path in paths] for name, paths in sets.items()}},
            evaluation={"length_buckets": [16, 24]},
            batch={"pairs_per_step": 6, "pairs_per_micro_batch": 2},
            train={"max_steps": 2},
        )
        rows = [row for row in train_on(world_size, run) if "eval/loss" in row]
        assert [row["step"] for row in rows] == [0, 2]
        found[world_size] = rows
    expected = mean_logps(inputs / "model", held_out)
    for world_size, (first, last) in found.items():
        assert (first["eval/logps/chosen"], first["eval/logps/rejected"]) == pytest.approx(expected, rel=1e-5)
        assert last == pytest.approx(found[1][1], rel=1e-4, abs=1e-5), world_size
        # Not a multiple of 1/13 if a pair were left out or counted twice.
        wins = last["eval/rewards/accuracies"] * PAIRS
        assert wins == pytest.approx(round(wins), abs=1e-6)
        for kind, counts in (
            ("", {"seven": 7, "rest": 6}),
            ("source/", {"seven": 7, "four": 4, "two": 2}),
            ("length/", {name: last.get(f"eval/length/{name}/pairs", 0) for name in ("1-16", "17-24", "25-")}),
        ):
            assert {name: last.get(f"eval/{kind}{name}/pairs", 0) for name in counts} == counts
            assert sum(counts.values()) == last["eval/pairs"] == PAIRS
            for metric in ("loss", "rewards/accuracies", "rewards/margins"):
                parts = [last[f"eval/{kind}{name}/{metric}"] * count for name, count in counts.items() if count]
                assert sum(parts) == pytest.approx(last[f"eval/{metric}"] * PAIRS, rel=1e-9, abs=1e-9), (kind, metric)
        for name, paths in sets.items():
            by_file = [mean_logps(inputs / "model", path)[0] * len(path.read_text().splitlines()) for path in paths]
            mean = first[f"eval/{name}/logps/chosen"]
            assert mean == pytest.approx(sum(by_file) / first[f"eval/{name}/pairs"], rel=1e-5)
    assert abs(found[1][1]["eval/rewards/margins"]) > 1e-4, "nothing was trained"


def mean_logps(model: Path, rows: Path) -> tuple[float, float]:
    """One sequence at a time with transformers alone."""
    from dsdpo.data.pairs import Group

    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    pairs = []
    for index, line in enumerate(rows.read_text().splitlines()):
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        responses = [
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True, return_dict=False)[len(prompt) :]
            for side in ("chosen", "rejected")
        ]
        pairs.append(Group.of(index, *(torch.tensor(ids).numpy() for ids in (prompt, *responses))))
    with torch.no_grad():
        chosen, rejected = plain_logps(lm, pairs)
    return float(chosen.mean()), float(rejected.mean())


def test_evaluation_leaves_training_as_it_was(inputs: Path, held_out: Path, tmp_path: Path) -> None:
    often = {"data": {"eval": str(held_out)}, "evaluation": {"every_steps": 1}}
    with_evaluation = train_on(2, settings(tmp_path / "often", inputs, **often))
    without = train_on(2, settings(tmp_path / "never", inputs))
    names = ("loss", "grad_norm", "logps/chosen")
    assert [[row[name] for name in names] for row in with_evaluation if "loss" in row] == [
        [row[name] for name in names] for row in without
    ]
    assert metrics(tmp_path / "never" / "run") == without
