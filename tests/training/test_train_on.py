"""Training on responses of several turns: what is not learned changes nothing but as context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import settings, train_on


def test_users_turns_count_in_no_loss_whatever_layout_and_reference(inputs: Path, tmp_path: Path) -> None:
    """A user's turn within both responses: the same losses in both layouts and from stored log-probs of masked and
    unmasked runs in one store; others once all is learned."""
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()[:24]]
    for row, other in zip(rows[::2], rows[1::2], strict=True):  # every second row stays one of a single turn
        for name in ("chosen", "rejected"):
            row[name] = [*row[name], *other["prompt"], *other[name]]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    store = {"store": str(tmp_path / "store")}

    def metrics(name: str, layout: str, strategy: str, learned: str) -> list[tuple[float, float]]:
        sections: dict[str, Any] = {
            "data": {"train": str(data), "train_on": learned, "layout": layout, "shuffle": False},
            "reference": {"strategy": strategy, **(store if strategy == "precomputed" else {})},
            "train": {"max_steps": 3},
            "loss": {"type": "ipo"},  # divides by the number of learned tokens
        }
        stages = {"policy_zero": "zero1", "reference_zero": "zero0"}  # one rank has nothing to gather
        rows = train_on(1, settings(tmp_path / name, inputs, **stages, **sections))
        return [(row["loss"], row["logps/chosen"]) for row in rows if "loss" in row]

    packed = metrics("packed", "packed", "separate", "assistant")
    everything = metrics("all", "packed", "precomputed", "all")
    stored = metrics("stored", "padded", "precomputed", "assistant")
    for ours, theirs in zip(packed, stored, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert all(whole[1] < masked[1] - 1 for whole, masked in zip(everything, packed, strict=True))
    assert abs(packed[-1][0] - everything[-1][0]) > 1e-3
