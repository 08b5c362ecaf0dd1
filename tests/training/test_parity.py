"""TRL's trajectories, step by step: same model, same rows, same optimizer (see ../shared/parity/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED
from tests.runs import settings, train_on

RELATIVE = ("loss", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
TRDPO = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 4}
# The adapter starts as nothing (every lora_B is 0), so its frozen copy and the bare base are the same reference.
LORA = {"model": {"lora": {"path": str(SHARED / "parity" / "lora_init")}}, "optimizer": {"learning_rate": 1e-3}}
# Each on two ranks, over the stages of ZeRO. One rank sums nothing over ranks, and says little that two do not.
CASES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("sigmoid", 1, "zero3", {}),
    ("sigmoid", 2, "zero3", {}),
    ("ipo", 2, "zero2", {"loss": {"type": "ipo"}}),
    ("hinge", 2, "zero1", {"loss": {"type": "hinge"}}),
    ("precompute", 2, "zero3_offload", {"reference": {"strategy": "precomputed"}}),
    ("lora", 2, "zero2", LORA),
    ("trdpo", 2, "zero3", {"reference": TRDPO}),
]
SELDOM: list[tuple[str, int, str, dict[str, Any]]] = [
    ("precompute", 1, "zero3", {"reference": {"strategy": "precomputed"}}),
    ("lora", 1, "zero3", LORA),
    ("lora", 2, "zero3", LORA),
    ("trdpo", 1, "zero3", {"reference": TRDPO}),
]


def first_rows(path: Path, folder: Path, count: int) -> Path:
    """The rows that are trained on, so that no time goes into preparing others."""
    copy = folder / path.name
    copy.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return copy


@pytest.mark.parametrize(
    ("name", "world_size", "zero", "sections"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in SELDOM)],
    ids=["-".join(map(str, case[:3])) for case in [*CASES, *SELDOM]],
)
def test_trl_trajectory(
    name: str, world_size: int, zero: str, sections: dict[str, Any], shared: Path, tmp_path: Path
) -> None:
    expected = json.loads((shared / "parity" / f"{name}.json").read_text())["steps"]
    run = settings(
        tmp_path,
        shared,
        policy_zero=zero,
        data={
            "train": str(first_rows(shared / "data" / "train.jsonl", tmp_path, 24 * 8)),
            "max_length": 512,
            "shuffle": False,
            "cache_dir": str(tmp_path / "cache"),
        },
        batch={"pairs_per_step": 8, "pairs_per_micro_batch": 4},
        train={"max_steps": 24},
        **sections,
    )
    run["model"] |= {"path": str(shared / "models" / "tiny-sft")}
    run["optimizer"] = {"learning_rate": 1e-4, "warmup_steps": 4, **sections.get("optimizer", {})}
    rows = train_on(world_size, run)
    assert len(rows) == len(expected) == 24
    for row, trl in zip(rows, expected, strict=True):
        for metric in RELATIVE:
            assert row[metric] == pytest.approx(trl[metric], rel=1e-4), (trl["step"], metric)
        for metric in REWARDS:
            assert row[metric] == pytest.approx(trl[metric], abs=2e-4), (trl["step"], metric)
        # While policy and reference are the same, log-probs scored in other batches differ by rounding alone.
        if name != "precompute" or trl["rewards/margins"]:
            assert row["rewards/accuracies"] == pytest.approx(trl["rewards/accuracies"]), trl["step"]
