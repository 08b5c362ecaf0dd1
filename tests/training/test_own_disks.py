"""A run whose output_dir is on disks that nodes do not share: each rank has a mount namespace of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.commands.processes import environment_of, free_port
from tests.runs import losses, metrics, settings, train_on
from tests.warm import warm_dsdpo

LIMIT_S = 400
MOUNTED = 'mount --make-rprivate / && mount --bind "$DISK" "$0" && exec "$@"'  # this node's disk at the common path


def on_own_disks(run: dict[str, Any], disks: list[Path], *options: str) -> list[tuple[int, str]]:
    """The run on a rank per disk, which each sees at output_dir; exit codes and what was said."""
    folder = Path(run["output_dir"])
    folder.mkdir(exist_ok=True)
    path = folder.parent / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    port, started = str(free_port()), []
    for rank, disk in enumerate(disks):
        disk.mkdir(exist_ok=True)
        who = {"RANK": str(rank), "WORLD_SIZE": str(len(disks)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env = environment_of(**who, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DISK=str(disk))
        command = ["unshare", "-m", "bash", "-c", MOUNTED, str(folder)]
        command += [*warm_dsdpo(), "train", str(path), *options]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env))
    answers = [(process.communicate(timeout=LIMIT_S)[0], process.returncode) for process in started]
    print(*(said for said, _ in answers), sep="\n=====\n")
    return [(code, said) for said, code in answers]


def names(disk: Path) -> list[str]:
    return sorted(path.name for path in (disk / "checkpoints").iterdir())


def test_each_disk_keeps_its_part_and_a_resume_finds_the_parts(inputs: Path, tmp_path: Path) -> None:
    """Trained to step 4 and on to 6, also after nodes have changed places; refused where a part is nowhere."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces need root")
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5}
    sections = {"reference": moves, "checkpoint": {"every_steps": 2, "keep_last": 2}, "train": {"max_steps": 6}}
    whole = settings(tmp_path / "whole", inputs, **sections)
    run = settings(tmp_path / "split", inputs, **sections)
    disks = [tmp_path / "disk-0", tmp_path / "disk-1"]

    common = Path(whole["output_dir"])
    expected_losses = losses(train_on(2, whole))
    [(code, said), (other, _)] = on_own_disks(run, disks)
    assert (code, other) == (0, 0)
    assert "output_dir is on 2 disks" in said
    assert losses(metrics(disks[0])) == expected_losses
    expected, found = (load_file(disk / "model" / "model.safetensors") for disk in (common, disks[0]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    assert names(disks[0]) == names(disks[1]) == ["step-000004", "step-000006"]
    parts = [disk / "checkpoints" / "step-000004" for disk in disks]
    own = [{path.name for path in part.iterdir() if path.name.startswith("rank")} for part in parts]
    assert own == [{"rank-0.safetensors"}, {"rank-1.safetensors"}]
    assert [path.name for path in disks[1].iterdir()] == ["checkpoints"]
    lists = [json.loads((part / "manifest.json").read_text()) for part in parts]
    assert lists[0] == lists[1]
    assert {"rank-0.safetensors", "rank-1.safetensors"} <= lists[0].keys()

    # Ranks on each other's nodes: what they read is sent to where they are now.
    for disk in disks:
        subprocess.run(["rm", "-r", disk / "checkpoints" / "step-000006"], check=True)
    (disks[1] / "metrics.jsonl").write_bytes((disks[0] / "metrics.jsonl").read_bytes())
    [(code, said), (other, _)] = on_own_disks(run, disks[::-1], "--resume", "auto")
    assert (code, other) == (0, 0)
    assert f"resumed from {run['output_dir']}/checkpoints/step-000004" in said
    assert losses(metrics(disks[1])) == expected_losses
    found = load_file(disks[1] / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # A node is gone, and with it what no other disk has.
    for name in names(disks[0]):
        for path in (disks[0] / "checkpoints" / name).rglob("*rank*1*"):
            path.unlink()
    [(code, said)] = on_own_disks(run, disks[:1], "--resume", "auto")
    assert code == 2
    assert "is missing, which lay on" in said
    assert "no checkpoint is whole" in said
