"""A run goes on with other ranks and under another ZeRO stage as if nothing had happened: same pairs, same losses."""

from __future__ import annotations

import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankError, run_ranks
from tests.runs import REFERENCES, metrics, settings, train_here, write_json

MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.3}
LORA = {"model": {"lora": {"r": 4}}, "reference_zero": None}
# What the run is, and how its parts are trained: ranks, policy's stage, reference's stage.
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, str, str]]]] = {
    "ranks, then stage": ({}, [(2, "zero3", "zero3"), (1, "zero3", "zero3"), (1, "zero2", "zero3")]),
    "offload": ({}, [(2, "zero1", "zero0"), (2, "zero3_offload", "zero0"), (1, "zero3", "zero0")]),
    "adapter": (
        {**LORA, "reference": {"strategy": "adapter"}},
        [(2, "zero3", ""), (1, "zero1", ""), (2, "zero3_offload", "")],
    ),
    "quantized": (
        {"model": {"lora": {"r": 4}, "quantization": {"bits": 4}}, "reference_zero": None},
        [(2, "zero3", ""), (1, "zero2", "")],
    ),
    "moving-adapter": (
        {**LORA, "reference": {**MOVES, "strategy": "adapter"}, "tracking": {"every_steps": 3}},
        [(1, "zero1", ""), (2, "zero2", "")],
    ),
    "moving": (
        {"reference": MOVES, "tracking": {"every_steps": 3}},
        [(2, "zero3", "zero3"), (1, "zero2", "zero0"), (3, "zero3", "zero3")],
    ),
    "snapshot": (
        {"reference": {**MOVES, "strategy": "policy_snapshot", "ref_model_mixup_alpha": 1.0}, "reference_zero": None},
        [(2, "zero3", ""), (1, "zero2", "")],
    ),
}


def run_of(folder: Path, inputs: Path, policy_zero: str, own_zero: str, **case: Any) -> dict[str, Any]:
    """Six steps, if `train` says nothing else, a checkpoint every second, an evaluation after the fourth."""
    run = settings(
        folder,
        inputs,
        policy_zero=policy_zero,
        **{
            "data": {"eval": str(inputs / "few.jsonl")},
            "train": {"max_steps": 6},
            "checkpoint": {"every_steps": 2, "keep_last": 9, "resume": "auto"},
            "evaluation": {"every_steps": 4, "at_start": False},
            **case,
        },
    )
    if own_zero:
        run["reference"]["deepspeed"] = write_json(folder / "reference.json", REFERENCES[own_zero])
    return run


def train_and_watch(run: dict[str, Any]) -> tuple[list[list[int]], str]:
    """Train; the pairs of each step that this rank trained on, and what was said."""
    from dsdpo.run import loop

    steps: list[list[int]] = []
    original = loop.train_step

    def watched(*arguments: Any, **options: Any) -> Any:
        ids = [pair for batch in arguments[3].batches for pair in batch.pair_ids.tolist()]
        steps.append([pair for pair in ids if pair >= 0])
        return original(*arguments, **options)

    loop.train_step = watched  # type: ignore[assignment]
    try:
        with redirect_stdout(StringIO()) as said:
            train_here(run)
    finally:
        loop.train_step = original
    return steps, said.getvalue()


def pairs_by_step(results: list[tuple[list[list[int]], str]]) -> list[list[int]]:
    """Of all ranks together."""
    return [sorted(pair for part in parts for pair in part) for parts in zip(*(ids for ids, _ in results), strict=True)]


def numbers(rows: list[dict[str, float]], after: int) -> dict[tuple[float, str], float]:
    """What was computed of the pairs after a step, by step and name."""
    # Not rewards/accuracies: where the reference is the policy, which of two equal rewards is the larger is rounding.
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/", "learning_rate", "grad_norm")
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if row["step"] > after and name.removeprefix("eval/").startswith(names)
    }


@pytest.mark.parametrize("case", CASES)
def test_resumed_elsewhere_equals_uninterrupted(case: str, inputs: Path, tmp_path: Path) -> None:
    sections, parts = CASES[case]
    if case == "quantized":
        pytest.importorskip("bitsandbytes")
    folders = [tmp_path / f"part{index}" for index in range(len(parts))]
    expected: list[list[int]] = []
    rows: list[dict[str, float]] = []
    train = {"max_steps": 2 * len(parts)}
    for index, (ranks, policy, reference) in enumerate(parts):
        run = run_of(folders[index], inputs, policy, reference, train=train, **sections)
        done = 2 * index
        if done:  # as if the part before had been killed after this checkpoint
            name = f"step-{done:06d}"
            before = folders[index - 1] / "run"
            shutil.copytree(before / "checkpoints" / name, folders[index] / "run" / "checkpoints" / name)
            shutil.copy(before / "metrics.jsonl", folders[index] / "run")
        results = run_ranks(ranks, train_and_watch, run)
        pairs, found = pairs_by_step(results), metrics(folders[index] / "run")
        if not done:
            expected, rows = pairs, found
            assert sum(map(len, pairs)) == len({pair for step in pairs for pair in step}) == 16 * len(parts)
            continue
        was, now = parts[index - 1], parts[index]
        said = results[0][1]
        assert (f"changed since {name}: ranks were {was[0]} and are {now[0]}" in said) == (was[0] != now[0])
        assert (f"changed since {name}: ZeRO stage was {was[1][4]} and is {now[1][4]}" in said) == (
            was[1][4] != now[1][4]
        )
        assert pairs == expected[done:]
        assert numbers(found, done) == pytest.approx(numbers(rows, done), abs=1e-5, rel=1e-5)


def test_a_snapshot_that_lacks_pairs_is_refused(inputs: Path, tmp_path: Path) -> None:
    sections, _ = CASES["snapshot"]
    moves = {**sections["reference"], "ref_model_sync_steps": 6}
    run = run_of(tmp_path, inputs, "zero2", "", **{**sections, "reference": moves})
    run["evaluation"] = {"every_steps": 0, "at_start": False}
    run["train"] = {"max_steps": 7}
    run_ranks(2, train_here, {**run, "checkpoint": {"every_steps": 2, "keep_last": 9}})
    for step in (4, 6, 7):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    # After the third step an evaluation is wanted, of which nobody knew when the snapshot was taken.
    later = {**run, "evaluation": {"every_steps": 3, "at_start": False}}
    with pytest.raises(RankError, match=r"the snapshot has nothing on pair \d+, which is needed"):
        run_ranks(2, train_here, later)
