"""Checkpoints that are written while training goes on: the same files, the same guarantees, one at a time."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsdpo.disks import Disk
from dsdpo.errors import ConfigError, TrainingError
from dsdpo.host_memory import group_memory
from dsdpo.training.checkpoint import Retention, TrainState, whole_checkpoints
from dsdpo.training.parts import written_by
from tests.ranks import run_ranks
from tests.runs import metrics, settings

MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3}
SNAPSHOT = {**MOVES, "strategy": "policy_snapshot", "ref_model_mixup_alpha": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "zero3 offload, moving": {"policy_zero": "zero3_offload", "reference": MOVES, "model": {"dtype": "bfloat16"}},
    "zero2, snapshot": {"policy_zero": "zero2", "reference": SNAPSHOT, "reference_zero": None},
}

CHEAP: dict[str, Any] = {"policy_zero": "zero2", "reference_zero": "zero0"}  # where the stage is not the point


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_a_save_that_training_waits_for(case: str, inputs: Path, tmp_path: Path) -> None:
    """Although weights, optimizer, reference, sums and random numbers change before they are written."""
    run = settings(tmp_path, inputs, **CASES[case], checkpoint={"every_steps": 1})
    predicted = run_ranks(2, saved_twice, run, str(tmp_path))[0]
    paths = [tmp_path / name / "step-000001" for name in ("at-once", "beside")]
    at_once, beside = (json.loads((path / "manifest.json").read_text()) for path in paths)
    assert at_once == beside
    assert {"rank-0.safetensors", "rank-1.safetensors", "reference/rank-1.safetensors"} <= at_once.keys()
    files = [path for name in at_once if name.endswith((".pt", ".safetensors")) for path in [paths[0] / name]]
    assert sum(path.stat().st_size for path in files) == pytest.approx(predicted, rel=0.15)


def saved_twice(run: dict[str, Any], folder: str) -> float:
    """Save at once, and again while more steps are taken; the bytes that the copies were said to take."""
    from dsdpo.config.loss import LossConfig
    from dsdpo.distributed import gather_objects
    from dsdpo.engine.quirks.put_off import HostCopies
    from dsdpo.run.background import copied_bytes
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.training import saving as module
    from dsdpo.training.metrics import Meter
    from dsdpo.training.step import train_step
    from dsdpo.training.step_loss import StepLoss
    from tests.engines import planned

    plan = planned(run)
    policy, reference = build_policy_and_reference(plan)
    meter, loss = Meter(), StepLoss(LossConfig())
    windows = list(plan.training_windows(torch.device("cpu")))

    def step(number: int) -> None:
        window = windows[number]
        train_step(policy, reference.score(window.batches), loss, window, meter)
        reference.after_step(number + 1)

    def save(name: str, copies: HostCopies | None) -> Any:
        parts = {"policy": policy, "reference": reference, "meter": meter, "record": {}}
        return module.begin_checkpoint(Path(folder) / name, TrainState(1, 8), **parts, copies=copies)

    step(0)
    keep = Retention(last=1)
    module.finish_checkpoint(save("at-once", None), keep)
    gate = threading.Event()
    slow, module._write_own = module._write_own, behind(gate, module._write_own)
    try:
        copies = HostCopies()
        under_way = save("beside", copies)
        step(1)
        torch.rand(1)
        gate.set()
        module.finish_checkpoint(under_way, keep)
    finally:
        module._write_own = slow
    return sum(gather_objects(copied_bytes(plan, policy)))


def test_each_file_is_summed_by_the_rank_that_wrote_it(tmp_path: Path) -> None:
    """Of two ranks on one disk: its own by each, by the first what is no rank's, and nobody's hidden one by none."""
    names = ["rank-0.safetensors", "rank-1.safetensors", "identity.json", ".tmpAm0V0I", "policy/x_rank_1_mp_rank_00.pt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    disk = Disk(((0, 1),))
    assert written_by(0, tmp_path, disk) == ["identity.json", "rank-0.safetensors"]
    assert written_by(1, tmp_path, disk) == ["policy/x_rank_1_mp_rank_00.pt", "rank-1.safetensors"]


def behind(gate: threading.Event, work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work once the gate is open: a disk as slow as the test needs it."""

    def wait(*arguments: Any) -> Any:
        assert gate.wait(120)
        return work(*arguments)

    return wait


def test_training_goes_on_and_the_next_save_waits(inputs: Path, tmp_path: Path) -> None:
    """Rank 0's disk is done only when the second save is due, which says so."""
    run = settings(tmp_path, inputs, **CHEAP, train={"max_steps": 5}, checkpoint={"every_steps": 2, "keep_last": 9})
    said, rows, whole = run_ranks(2, train_on_a_slow_disk, run)[0]
    assert "the checkpoint after step 4 waits for that of step 2, which is still being written" in said
    assert rows == [1, 2, 3, 4]
    assert whole == []
    folder = Path(run["output_dir"]) / "checkpoints"
    assert [path.name for path in folder.iterdir() if path not in whole_checkpoints(folder)] == []
    assert [path.name for path in whole_checkpoints(folder)] == [f"step-{step:06d}" for step in (2, 4, 5)]


def train_on_a_slow_disk(run: dict[str, Any]) -> tuple[str, list[float], list[Path]]:
    """What the saver said when it had to wait; the rows and whole checkpoints that there were then."""
    gate, folder = threading.Event(), Path(run["output_dir"])
    found: list[Any] = ["", [], []]

    class Opens(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not gate.is_set():
                rows = [row["step"] for row in metrics(folder)]
                found[:] = record.getMessage(), rows, whole_checkpoints(folder / "checkpoints")
            gate.set()

    logger, handler = logging.getLogger("dsdpo.training.saver"), Opens()
    logger.addHandler(handler)
    try:
        train_behind(gate, run)
    finally:
        logger.removeHandler(handler)
    return tuple(found)


def train_behind(gate: threading.Event, run: dict[str, Any], **callbacks: Any) -> int:
    """Train in this rank, whose disk is slow if it is rank 0; the exit code."""
    from dsdpo.commands.train import train
    from dsdpo.config.run import RunConfig
    from dsdpo.run.plan import plan_run
    from dsdpo.training import saving as module
    from dsdpo.training.callbacks import Callbacks

    slow, plan = module._write_own, plan_run(RunConfig.model_validate(run))
    if torch.distributed.get_rank() == 0:
        module._write_own = behind(gate, slow)
    try:
        return train(plan, Callbacks(**callbacks))
    finally:
        module._write_own = slow


@pytest.mark.parametrize("by", ["a stop", "an error"])
def test_a_run_that_ends_early_waits_for_the_save_in_flight(by: str, inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, **CHEAP, train={"max_steps": 9}, checkpoint={"every_steps": 2})
    outcomes = run_ranks(2, end_early, run, by == "an error")
    names = [path.name for path in whole_checkpoints(Path(run["output_dir"]) / "checkpoints")]
    if by == "a stop":
        assert outcomes == [(75, [2, 3]), (75, [])]
        assert names == ["step-000002", "step-000003"]
    else:
        assert outcomes == [("the callback", []), ("the callback", [])]
        assert names == ["step-000002"]


def end_early(run: dict[str, Any], fails: bool) -> tuple[int | str, list[int]]:
    """Stop, or fail, after step 3, before rank 0's disk is done; the exit code or error, and which saves were told."""
    gate, told = threading.Event(), []

    def after_step(event: Any) -> None:
        if event.step == 3:
            threading.Timer(0.3, gate.set).start()
            if fails:
                raise ValueError
            event.stop()

    try:
        code = train_behind(gate, run, on_step=[after_step], on_save=[lambda event: told.append(event.step)])
    except TrainingError as error:
        return str(error)[:12], told
    return code, told


def test_host_memory_decides(inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, checkpoint={"every_steps": 1})
    for answers in run_ranks(2, choices, run):
        # Half of 3 times the copies of both ranks is enough, of 1.5 times is not; a run that asks for it may take all.
        assert answers == {"auto, 3": True, "auto, 1.5": False, "True, 1.5": True, "False, 3": False}


def choices(run: dict[str, Any]) -> dict[str, bool]:
    """Whether checkpoints are written in the background, by setting and free memory."""
    from dsdpo.distributed import gather_objects
    from dsdpo.run import background as module
    from tests.engines import planned, policy_of

    plan = planned(run)
    policy, probe = policy_of(plan), module.free_memory
    both = sum(gather_objects(module.copied_bytes(plan, policy)))

    def in_background(wish: bool | str, times: float) -> bool:
        settings = plan.run.checkpoint.model_copy(update={"background": wish})
        asked = replace(plan, run=plan.run.model_copy(update={"checkpoint": settings}))
        module.free_memory = lambda: int(both * times)
        return module.host_copies(asked, policy) is not None

    try:
        with pytest.raises(ConfigError, match=r"would take .* of host memory on .*, which has .* free"):
            in_background(True, 0.9)
        cases: list[tuple[bool | str, float]] = [("auto", 3), ("auto", 1.5), (True, 1.5), (False, 3)]
        return {f"{wish}, {times}": in_background(wish, times) for wish, times in cases}
    finally:
        module.free_memory = probe


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current", "inactive_file")),
        ("4:memory:/job/step", "memory/job", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_control_groups_limit_counts(line: str, folder: str, names: tuple[str, str, str], tmp_path: Path) -> None:
    """Of a limit of 1,000 that a group above has, 600 are used, 250 of them by pages of files: 650 are left."""
    (tmp_path / folder / "step").mkdir(parents=True)
    limit, usage, cached = names
    (tmp_path / folder / "step" / limit).write_text("max\n")
    for name, text in ((limit, "1000"), (usage, "600"), ("memory.stat", f"anon 350\n{cached} 250\n")):
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "cgroup").write_text(f"3:cpu:/elsewhere\n{line}\n")
    assert list(group_memory(tmp_path / "cgroup", tmp_path)) == [650]
