"""Held-out metrics: every pair once, whatever the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import metrics, settings, train_on
from tests.tiny import plain_logps

PAIRS = 13  # a prime: no number of ranks or micro-batches divides it
EDGE = 20  # of length buckets, in tokens
SIDES = ("chosen", "rejected")
Numbers = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def held_out(inputs: Path) -> Path:
    """Pairs of which some have the longer response chosen, some rejected."""
    rows = [json.loads(line) for line in (inputs / "test.jsonl").read_text().splitlines()[:PAIRS]]
    for place, row in enumerate(rows):
        if place % 3:
            row[SIDES[place % 3 - 1]][-1]["content"] += " it is so ." * (1 + place % 2)
    path = inputs / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_held_out_metrics_are_those_of_a_plain_loop(inputs: Path, held_out: Path, tmp_path: Path) -> None:
    """Of all pairs, by set, by source and by length, on one rank and on two, before any step and after the last."""
    lines = held_out.read_text().splitlines(keepends=True)
    sets = {"seven": [tmp_path / "seven.jsonl"], "rest": [tmp_path / "four.jsonl", tmp_path / "two.jsonl"]}
    for path, part in zip([*sets["seven"], *sets["rest"]], (lines[:7], lines[7:11], lines[11:]), strict=True):
        path.write_text("".join(part))
    before = pair_numbers(inputs / "model", held_out)
    for world_size in (1, 2):
        run = settings(
            tmp_path / str(world_size),
            inputs,
            data={"eval": {name: [str(path) for path in paths] for name, paths in sets.items()}},
            evaluation={"length_buckets": [EDGE, EDGE + 1]},
            batch={"pairs_per_step": 6, "pairs_per_micro_batch": 2},
            train={"max_steps": 2},
            optimizer={"learning_rate": 1e-2},
            **({"policy_zero": "zero1", "reference_zero": "zero0"} if world_size == 1 else {}),  # nothing to gather
        )
        first, last = (row for row in train_on(world_size, run) if "eval/loss" in row)
        assert (first["step"], last["step"]) == (0, 2)
        after = pair_numbers(Path(run["output_dir"]) / "model", held_out)
        assert np.abs(after["chosen"] - before["chosen"]).max() > 1e-2, "nothing was trained"
        compare(first, expected_metrics(before, before))
        compare(last, expected_metrics(after, before))


def compare(row: dict[str, float], expected: dict[str, float]) -> None:
    """The held-out metrics of a row are these and no others; counts are exact."""
    found = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
    assert set(found) == set(expected)
    for name, value in expected.items():
        if name.endswith(("pairs", "accuracies", "ties", "longer", "shorter")):
            assert found[name] == pytest.approx(value, abs=1e-12), name
        else:
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def expected_metrics(policy: Numbers, reference: Numbers, beta: float = 0.1) -> dict[str, float]:
    """DPO's held-out metrics, pair by pair in float64, of all pairs and of each part of them."""
    gains = {side: policy[side] - reference[side] for side in SIDES}
    margin = beta * (gains["chosen"] - gains["rejected"])
    sizes = {side: policy[f"{side}_tokens"] for side in SIDES}
    length = policy["prompt_tokens"] + np.maximum(*sizes.values())
    place = np.arange(PAIRS)
    parts = {"": place >= 0, "seven/": place < 7, "rest/": place >= 7, "source/seven/": place < 7}
    parts |= {"source/four/": (place >= 7) & (place < 11), "source/two/": place >= 11}
    parts |= {f"length/1-{EDGE}/": length <= EDGE, f"length/{EDGE + 1}-{EDGE + 1}/": length == EDGE + 1}
    parts |= {f"length/{EDGE + 2}-/": length > EDGE + 1}
    found: dict[str, float] = {}
    for name, those in parts.items():
        if not those.any():
            continue
        own = margin[those]
        values = {
            "loss": np.log1p(np.exp(-own)).mean(),
            "rewards/accuracies": (own > 0).mean(),
            "rewards/margins": own.mean(),
            "pairs": float(those.sum()),
        }
        if not name.startswith(("source/", "length/")):
            tokens = {side: sizes[side][those] for side in SIDES}
            for side in SIDES:
                values[f"rewards/{side}"] = beta * gains[side][those].mean()
                values[f"logps/{side}"] = policy[side][those].mean()
                values[f"lengths/{side}"] = tokens[side].mean()
            values["rewards/ties"] = (own == 0).mean()
            values["reference/drift"] = sum(gains[side][those].mean() for side in SIDES) / 2
            values["nll/chosen"] = -policy["chosen"][those].sum() / tokens["chosen"].sum()
            values["perplexity/chosen"] = np.exp(values["nll/chosen"])
            difference = tokens["chosen"] - tokens["rejected"]
            for kind, of in (("longer", difference > 0), ("shorter", difference < 0)):
                if of.any():
                    values[f"rewards/accuracies_chosen_{kind}"] = (own[of] > 0).mean()
            values["rewards/calibration_error"] = calibration(own)
            if own.std() > 0 and difference.std() > 0:
                values["rewards/length_correlation"] = np.corrcoef(own, difference)[0, 1]
        found |= {f"{name}{key}": float(value) for key, value in values.items()}
    return found


def calibration(margins: np.ndarray) -> float:
    """Over ten bins of sigma(|margin|): share of pairs times how far being right is from being sure, one by one."""
    error = 0.0
    for lowest in np.arange(0.5, 1.0, 0.05):
        sure = 1 / (1 + np.exp(-np.abs(margins)))
        within = (sure >= lowest) & (sure < lowest + 0.05)
        right = np.where(margins == 0, 0.5, margins > 0)
        if within.any():
            error += within.mean() * abs(right[within].mean() - sure[within].mean())
    return float(error)


def pair_numbers(model: Path, rows: Path) -> Numbers:
    """Log-probs, one sequence at a time with transformers alone, and tokens of each pair."""
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
            for side in SIDES
        ]
        pairs.append(Group.of(index, *(torch.tensor(ids).numpy() for ids in (prompt, *responses))))
    with torch.no_grad():
        logps = plain_logps(lm, pairs)
    found = {side: values.double().numpy() for side, values in zip(SIDES, logps, strict=True)}
    found |= {f"{side}_tokens": np.array([len(pair.responses[k]) for pair in pairs]) for k, side in enumerate(SIDES)}
    return found | {"prompt_tokens": np.array([len(pair.prompt) for pair in pairs])}


def test_evaluation_leaves_training_as_it_was(inputs: Path, held_out: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 3}
    often = {"data": {"eval": str(held_out)}, "evaluation": {"every_steps": 1}}
    with_evaluation = train_on(2, settings(tmp_path / "often", inputs, train=steps, **often))
    without = train_on(2, settings(tmp_path / "never", inputs, train=steps))
    names = ("loss", "grad_norm", "logps/chosen")
    assert [[row[name] for name in names] for row in with_evaluation if "loss" in row] == [
        [row[name] for name in names] for row in without
    ]
    assert metrics(tmp_path / "never" / "run") == without
