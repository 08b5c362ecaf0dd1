"""The names in a run folder: what starting over takes away, and files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsdpo.atomic import partial_path, write_json
from dsdpo.run_folder import RunFolder


def fill(folder: RunFolder) -> None:
    """Something under every name, with what interrupted writing leaves behind."""
    for path in [*folder.replaceable(), folder.lock]:
        path.mkdir() if path.suffix == "" and path.name != "STOP" else path.write_text("old")
        partial_path(path).write_text("cut off")


def test_starting_over_leaves_nothing_but_the_model_and_what_is_not_a_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    fill(folder)
    (tmp_path / "notes.txt").write_text("mine")
    folder.clear()
    kept = {"model", "merged", "run.lock", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert {path.name for path in folder.existing()} == {"model", "merged"}


def test_a_link_goes_and_what_it_points_to_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-000001").mkdir(parents=True)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.checkpoints.symlink_to(elsewhere)
    folder.clear()
    assert not folder.checkpoints.is_symlink()
    assert (elsewhere / "step-000001").is_dir()


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "identity.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["identity.json"]
