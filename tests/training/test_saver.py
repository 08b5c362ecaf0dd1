"""A disk that is full, for real: training goes on, earlier checkpoints stay, and the save is made up for."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsdpo.errors import CheckpointError, TrainingError
from dsdpo.training.checkpoint import whole_checkpoints
from dsdpo.training.jsonl import JsonlWriter
from dsdpo.training.saver import Retries
from tests.disks import empty, fill, small_disk
from tests.ranks import run_ranks
from tests.runs import metrics, settings, train_here

STEP = 2  # micro-batches on a rank
STAGES = ("zero3", "zero3")  # of policy and reference


def run_on(
    disk: Path, folder: Path, inputs: Path, stages: tuple[str, str] = STAGES, **checkpoint: Any
) -> dict[str, Any]:
    """Six steps in a run folder on the disk, a checkpoint every second."""
    policy, reference = stages
    often = {"every_steps": 2, "keep_last": 3, **checkpoint}
    run = settings(
        folder, inputs, policy_zero=policy, reference_zero=reference, train={"max_steps": 6}, checkpoint=often
    )
    return {**run, "output_dir": str(disk / "run")}


@pytest.mark.parametrize("background", [False, True])
def test_training_goes_on_and_saves_later_on_a_full_disk(background: bool, inputs: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=20_000) as disk:
        run = run_on(disk, tmp_path, inputs, background=background)
        # Full from the fourth step on, when a checkpoint is due, until the next has been trained on: in the background
        # that is when the failure is noticed, and it is tried again a step later.
        empty_at = (5 if background else 4) * STEP + 1
        warnings = run_ranks(2, train_on_a_full_disk, run, str(disk), 500, 3 * STEP + 1, empty_at)
        found = [path.name for path in whole_checkpoints(disk / "run" / "checkpoints")]
        again = 6 if background else 5
        assert found == sorted({"step-000002", f"step-00000{again}", "step-000006"})
        assert "NOT SAVED" in warnings[0][0]
        assert "step-000004.partial" in warnings[0][0]
        assert "earlier ones are intact" in warnings[0][0]
        assert f"tried again after step {again}" in warnings[0][0]
        assert background or "saved after step 5" in warnings[0][1]
        assert not list((disk / "run" / "checkpoints").glob("*.partial"))
        assert [row["step"] for row in metrics(disk / "run")] == list(range(1, 7))
        resumed = {**run, "checkpoint": {**run["checkpoint"], "resume": "auto"}}
        run_ranks(2, train_here, resumed)


def test_a_last_save_that_fails_still_exports_the_model(inputs: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=20_000) as disk:
        run = run_on(disk, tmp_path, inputs, save_attempts=2, save_pause=0) | {"train": {"max_steps": 5}}
        # Room for the exported model but for no checkpoint, from the last step on.
        outcome = run_ranks(2, train_on_a_full_disk, run, str(disk), 700, 4 * STEP + 1, None)
        for lines in outcome:
            assert "step-000005.partial" in lines[-1], "all ranks end with the error"
        assert [path.name for path in whole_checkpoints(disk / "run" / "checkpoints")] == ["step-000002", "step-000004"]
        assert "Given up" in outcome[0][-2]
        assert load_file(disk / "run" / "model" / "model.safetensors")


def test_a_failed_export_keeps_the_old_model_and_the_new_weights(inputs: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=20_000) as disk:
        settings = {"train": {"max_steps": 2}, "overwrite_output_dir": True, "optimizer": {"learning_rate": 1e-2}}
        run = (
            run_on(disk, tmp_path, inputs, ("zero2", "zero0"), every_steps=0, save_attempts=2, save_pause=0) | settings
        )
        run_ranks(2, train_here, run)
        model = disk / "run" / "model" / "model.safetensors"
        before = load_file(model)
        steps = {"max_steps": 4}
        outcome = run_ranks(2, train_on_a_full_disk, {**run, "train": steps}, str(disk), 100, 3 * STEP + 1, None)
        for lines in outcome:
            assert "model could not be written" in lines[-1], "all ranks end with the error"
        assert sorted(path.name for path in disk.glob("run/*") if "partial" in path.name) == []
        after = load_file(model)
        assert all(torch.equal(after[name], before[name]) for name in before), "the earlier run's model"
        elsewhere = Path(re.search(r"It is in (\S+) instead", outcome[0][-1])[1])  # type: ignore[index]
        trained = load_file(elsewhere / "model" / "model.safetensors")
        assert any(not torch.equal(trained[name], before[name]) for name in before)
        shutil.rmtree(elsewhere)
        # With a whole checkpoint of the last step nothing else is needed.
        empty(disk)
        run["checkpoint"] = {**run["checkpoint"], "every_steps": 2}
        said = run_ranks(2, train_on_a_full_disk, run, str(disk), 100, 10**6, None, True)[0]
        assert "step-000002 has everything: make room" in said[-1]
        empty(disk)
        run_ranks(2, train_here, {**run, "checkpoint": {**run["checkpoint"], "resume": "auto"}})
        assert not (disk / "run" / "export.partial").exists()


def train_on_a_full_disk(
    run: dict[str, Any], disk: str, leaving_kib: int, full_at: int, empty_at: int | None, at_export: bool = False
) -> list[str]:
    """Train while rank 0 fills the disk before one backward pass, counted from 1, and empties it before another.

    Or it fills it `at_export`.

    What is warned about, and the error at the end, if any.
    """
    calls = 0
    original = torch.Tensor.backward

    def backward(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if torch.distributed.get_rank() == 0:
            if calls == full_at + 2:  # the first two are those of the check of the JSON and of the warm-up
                fill(Path(disk), leaving_kib=leaving_kib)
            if calls == (empty_at or -3) + 2:
                empty(Path(disk))
        return original(*arguments, **options)

    from dsdpo.commands.train import train
    from dsdpo.config.run import RunConfig
    from dsdpo.run import export
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run))  # which tries DeepSpeed on a small model

    def check(*arguments: Any) -> None:
        if at_export and torch.distributed.get_rank() == 0:
            fill(Path(disk), leaving_kib=leaving_kib)
        return checked(*arguments)

    checked, export.check_trained = export.check_trained, check
    said = Messages()
    logger = logging.getLogger("dsdpo.training.saver")
    logger.addHandler(said)
    torch.Tensor.backward = backward  # type: ignore[method-assign]
    try:
        train(plan)
    except (CheckpointError, TrainingError) as error:
        said.lines.append(str(error))
    finally:
        torch.Tensor.backward = original  # type: ignore[method-assign]
        export.check_trained = checked
        logger.removeHandler(said)
    return said.lines


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_pauses_between_attempts_double_until_the_last() -> None:
    """Failing for ever after step 10: attempts after steps 10, 11, 13, 17, of which the fourth is the last."""
    tried, retries = [], Retries(4)
    for step in range(10, 30):
        if step == 10 or retries.owed(step):
            tried.append(step)
            if retries.failed_at(step):
                break
    assert tried == [10, 11, 13, 17]


def test_rows_wait_for_room_and_none_is_cut_or_doubled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        file = JsonlWriter(disk / "metrics.jsonl")
        fill(disk, leaving_kib=8)
        with caplog.at_level(logging.WARNING):
            for step in range(1, 31):
                file.write({"step": step, "text": "x" * 600})
        assert caplog.text.count("rows wait in memory") == 1
        with pytest.raises(OSError, match="No space left"):
            file.sync()
        empty(disk)
        file.sync()
        file.write({"step": 31})
        file.close()
        lines = (disk / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 32))
