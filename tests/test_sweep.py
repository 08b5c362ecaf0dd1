"""`launch/sweep.yaml`: what `wandb agent` makes of it is a run that loads, with the trial's settings."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dsdpo.config.load import dotted_keys, load_run, run_parser
from tests.commands.processes import finish

ROOT = Path(__file__).parents[1]
TRIAL = {"loss.beta": {"value": 0.25}, "optimizer.learning_rate": {"value": 5e-7}}


def test_a_trial_is_a_run_with_the_sweeps_settings(tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
    assert set(sweep["parameters"]) == set(TRIAL) <= set(dotted_keys())
    # As the agent does it: "${args}" becomes an option for each parameter.
    options = create_sweep_command_args({"args": TRIAL})["args"]
    words = [part for word in create_sweep_command(sweep["command"])
             for part in (options if word == "${args}" else [word])]  # fmt: skip
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    given = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial1", "RANKS": "2"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    answer = finish(words, limit_s=60, cwd=ROOT, PATH=path, RUN="launch/recipes/separate.yaml", **given)
    assert answer.returncode == 0
    shown = answer.stdout.splitlines()
    assert shown[:5] == ["--num_gpus", "2", "--module", "dsdpo", "train"]
    run, _ = load_run(shown[5:], run_parser("dsdpo train", ""))
    assert (run.loss.beta, run.optimizer.learning_rate) == (0.25, 5e-7)
    assert run.tracking.wandb is not None
    assert (run.tracking.wandb.group, run.output_dir) == ("sweep1", "runs/sweeps/sweep1/trial1")
    assert finish(words, limit_s=60, cwd=ROOT, PATH=path, **given).returncode == 2, "no RUN"
