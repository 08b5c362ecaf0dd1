"""Damage to any file of a checkpoint, of any kind, is noticed, and the one before is taken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsdpo.distributed import barrier
from tests.ranks import run_ranks
from tests.runs import settings, train_here


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path, place: float = 0.5) -> None:
    """One bit of the byte at `place` (0 to 1)."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


def flipped_at_start(path: Path) -> None:
    flipped(path, 0)


def flipped_at_end(path: Path) -> None:
    flipped(path, 1)


def next_step(path: Path) -> None:
    """A digit changed so that the JSON stays good."""
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def deleted(path: Path) -> None:
    path.unlink()


HARMS = (truncated, emptied, flipped, flipped_at_start, flipped_at_end, deleted)


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with checkpoints of steps 1 and 2, a moving reference included."""
    folder = tmp_path_factory.mktemp("trained")
    run = settings(
        folder,
        inputs,
        reference={"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3},
        train={"max_steps": 2},
        checkpoint={"every_steps": 1},
    )
    run_ranks(2, train_here, run)
    return {**run, "checkpoint": {**run["checkpoint"], "resume": "auto"}}


def test_every_kind_of_damage_to_every_file_is_noticed(trained: dict[str, Any]) -> None:
    outcomes = run_ranks(2, harm_one_after_the_other, trained)
    assert outcomes[0] == outcomes[1], "ranks disagree"
    found = outcomes[0]
    names = {name for name, _ in found}
    assert {"state.json", "manifest.json", "identity.json", "rank-0.safetensors", "rank-1.safetensors"} <= names
    assert {"reference/rank-0.safetensors", "reference/rank-1.safetensors"} <= names
    assert sum(name.startswith("policy/") and "rank_1" in name for name in names) == 2, names
    for case, (chosen, lines) in found.items():
        assert chosen == "step-000001", case
        assert len(lines) == (0 if case == ("state.json", "deleted") else 1), case  # without it, it is no checkpoint
        assert all("step-000002 is damaged" in line and "trying the one before it" in line for line in lines), case


def harm_one_after_the_other(run: dict[str, Any]) -> dict[tuple[str, str], tuple[str, list[str]]]:
    """By file and harm: the checkpoint that `--resume auto` finds, and what it says. Collective."""
    from dsdpo.config.run import RunConfig
    from dsdpo.training.resume import find_checkpoint

    config = RunConfig.model_validate(run)
    newest = Path(run["output_dir"]) / "checkpoints" / "step-000002"
    copy = Path(run["output_dir"]).parent / "copy"
    main = torch.distributed.get_rank() == 0
    if main:
        shutil.copytree(newest, copy)
    barrier()
    names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    outcomes = {}
    for name in names:
        for harm in (*HARMS, *((next_step,) if name == "state.json" else ())):
            if main:
                harm(newest / name)
            barrier()
            path, lines = find_checkpoint(config)
            outcomes[name, harm.__name__] = (path.name if path else "none", lines)
            barrier()
            if main:
                shutil.copy(copy / name, newest / name)
            barrier()
    path, lines = find_checkpoint(config)
    assert path == newest, "put back, it is whole again"
    return outcomes


def test_files_that_are_no_checkpoints_are_ignored(trained: dict[str, Any]) -> None:
    """DeepSpeed's own pointer, a folder without a state, and a file that is named like a checkpoint."""
    checkpoints = Path(trained["output_dir"]) / "checkpoints"
    for folder in (checkpoints, checkpoints / "step-000002", checkpoints / "step-000002" / "policy"):
        (folder / "latest").write_text("global_step999")
    (checkpoints / "step-000007").mkdir()
    (checkpoints / "step-000008").write_text("")
    (checkpoints / "step-000009.old").mkdir()
    (checkpoints / "step-000009.old" / "state.json").write_text("{}")
    assert run_ranks(2, resume_once, trained) == [("step-000002", []), ("step-000002", [])]


def resume_once(run: dict[str, Any]) -> tuple[str, list[str]]:
    """What `--resume auto` finds, after everything in it has been read."""
    from dsdpo.config.run import RunConfig
    from dsdpo.training.resume import find_checkpoint

    path, lines = find_checkpoint(RunConfig.model_validate(run))
    assert path is not None
    train_here({**run, "train": {**run["train"], "max_steps": 3}, "checkpoint": {**run["checkpoint"], **LONGER}})
    return path.name, lines


LONGER = {"allow_changes": ["train.max_steps"], "every_steps": 0}
