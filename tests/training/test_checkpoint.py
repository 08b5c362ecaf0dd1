"""A checkpoint is whole or it is none; what it holds comes back bit by bit."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsdpo.engine.quirks.put_off import HostCopies
from dsdpo.errors import CheckpointError
from dsdpo.training.checkpoint import Retention, TrainState, whole_checkpoints
from dsdpo.training.metrics import Meter
from dsdpo.training.saving import begin_checkpoint, finish_checkpoint
from tests.engines import planned, policy_of, reference_of, train_steps
from tests.ranks import run_ranks
from tests.runs import POLICIES, settings
from tests.tiny import random_batch


def save(plan: Any, policy: Any, folder: str, step: int, keep_last: int = 2, copies: HostCopies | None = None) -> Path:
    from dsdpo.reference.separate import SeparateReference

    reference = SeparateReference(reference_of(plan), score_tokens=1000)
    state = TrainState(step=step, consumed_pairs=8 * step)
    parts = {"policy": policy, "reference": reference, "meter": Meter(), "record": {}}
    return finish_checkpoint(begin_checkpoint(Path(folder), state, **parts, copies=copies), Retention(last=keep_last))


def test_newest_are_kept_and_half_written_ones_ignored(inputs: Path, tmp_path: Path) -> None:
    run, folder = settings(tmp_path, inputs), tmp_path / "checkpoints"
    (folder / "step-000004.partial").mkdir(parents=True)
    (folder / "step-000004.partial" / "state.json").write_text("{}")  # of a run that was killed
    (folder / "step-000009").mkdir()  # of someone who copied a part
    run_ranks(2, save_often, run, str(folder), [5, 10, 100, 2000])
    assert [path.name for path in whole_checkpoints(folder)] == ["step-000100", "step-002000"]
    assert not (folder / "step-000010").exists()
    newest = folder / "step-002000"
    assert '"consumed_pairs": 16000' in (newest / "state.json").read_text()
    written = {path: path.stat().st_mtime_ns for path in newest.rglob("*") if path.is_file()}
    assert len(written) > 4
    assert max(written, key=lambda path: written[path]).name == "state.json"
    assert list(folder.glob("step-002000.partial")) == []


def save_often(run: dict[str, Any], folder: str, steps: list[int]) -> None:
    plan = planned(run)
    policy = policy_of(plan)
    for step in steps:
        save(plan, policy, folder, step)


# Rank, and bytes that a file of its may have: none of DeepSpeed's fits; all but the largest do.
@pytest.mark.parametrize(("broken", "room"), [(1, 100), (0, 7000), (1, 20_000)])
def test_full_disk_on_one_rank_fails_on_all(broken: int, room: int, inputs: Path, tmp_path: Path) -> None:
    run, folder = settings(tmp_path, inputs), tmp_path / "checkpoints"
    messages = run_ranks(2, save_with_a_full_disk, run, str(folder), broken, room)
    for message in (message for of_rank in messages for message in of_rank):
        assert "step-000002.partial" in message
        assert "earlier ones are intact" in message
    assert [path.name for path in whole_checkpoints(folder)] == ["step-000001", "step-000003"]
    assert list(folder.glob("*.partial")) == [], "what a failed save wrote takes up room"


def save_with_a_full_disk(run: dict[str, Any], folder: str, broken: int, room: int) -> list[str]:
    """The errors of the second of three checkpoints, at once and in the background.

    Meanwhile `broken` may write no file beyond `room` bytes.
    """
    messages = []
    plan = planned(run)
    policy = policy_of(plan)
    save(plan, policy, folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == broken:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        for copies in (None, HostCopies()):
            with pytest.raises(CheckpointError) as caught:
                save(plan, policy, folder, 2, keep_last=1, copies=copies)
            messages.append(str(caught.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(plan, policy, folder, 3, keep_last=5)
    return messages


@pytest.mark.parametrize("stage", POLICIES)
def test_deepspeed_state_comes_back_bit_by_bit(stage: str, inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, policy_zero=stage, reference_zero="zero0")
    for saved, loaded, moved in run_ranks(2, save_and_load, run, str(tmp_path / "checkpoints")):
        assert moved, "training left the weights as they were"
        assert saved == loaded


def save_and_load(run: dict[str, Any], folder: str) -> tuple[list[float], list[float], bool]:
    """Margins of the steps after a checkpoint, without a break and from the checkpoint in a new engine."""
    from dsdpo.engine.shards import whole_state_dict

    batches = [random_batch(4, seed=seed, vocab=60) for seed in range(5)]
    plan = planned(run)
    policy = policy_of(plan)
    start = whole_state_dict(policy.module, keep=True)
    train_steps(policy, batches[:3])
    path = save(plan, policy, folder, 3)
    at_save = whole_state_dict(policy.module, keep=True)
    unbroken = train_steps(policy, batches[3:])

    again = policy_of(plan)
    again.load_checkpoint(str(path), tag="policy")
    loaded = whole_state_dict(again.module, keep=True)
    assert start is not None
    assert at_save is not None
    assert loaded is not None
    assert all(torch.equal(at_save[name], loaded[name]) for name in at_save)
    moved = not any(torch.equal(start[name], at_save[name]) for name in start)
    return unbroken, train_steps(again, batches[3:]), moved
