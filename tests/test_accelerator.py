"""A GPU that cannot be used is named, with what to install."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dsdpo.accelerator import CHOICE, Build, Machine, check_share, gpus_of_machine, hidden, too_old, why_unusable
from dsdpo.config.load import run_parser
from dsdpo.errors import ConfigError
from tests.warm import warm_python

H100 = "NVIDIA H100 80GB HBM3"
TWO = Machine("NVIDIA", (H100, H100), "535.129.03")


def nvidia(root: Path) -> Path:
    """The files that NVIDIA's driver 535 shows for two GPUs."""
    for address in ("0000:18:00.0", "0000:2a:00.0"):
        card = root / "proc/driver/nvidia/gpus" / address
        card.mkdir(parents=True)
        (card / "information").write_text(f"Model: \t\t {H100}\nIRQ:   \t\t 1\n")
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC 12.2\n"
    (root / "proc/driver/nvidia/version").write_text(text)
    return root


def test_nvidia_gpus_are_read_from_the_driver(tmp_path: Path) -> None:
    assert gpus_of_machine(nvidia(tmp_path)) == TWO
    assert TWO.describe() == f"2 NVIDIA GPUs ({H100})"


def test_open_driver_has_its_version_read(tmp_path: Path) -> None:
    nvidia(tmp_path)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    found = gpus_of_machine(tmp_path)
    assert found is not None
    assert found.driver == "580.65.06"


def test_device_files_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert gpus_of_machine(tmp_path) == Machine("NVIDIA", ("NVIDIA", "NVIDIA"), None)


def test_amd_nodes_with_compute_units_are_counted(tmp_path: Path) -> None:
    for node, units in enumerate((0, 304)):  # node 0 is the processor
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"cpu_cores_count 0\nsimd_count {units}\n")
    assert gpus_of_machine(tmp_path) == Machine("AMD", ("AMD",), None)


def test_machine_without_gpu(tmp_path: Path) -> None:
    assert gpus_of_machine(tmp_path) is None


@pytest.mark.parametrize(
    ("machine", "build", "error", "words"),
    [
        (TWO, Build("2.13.0+cpu", None, None), None, ("built without CUDA", "install torch built for CUDA")),
        (TWO, Build("2.13.0", "13.0", None), "old", ("driver 535.129.03 is too old", "needs 580", "update the driver")),
        (TWO, Build("2.11.0", "12.8", None), "no CUDA-capable device", ("no CUDA-capable device", "nvidia-smi")),
        (Machine("AMD", ("AMD",), None), Build("2.13.0+cpu", None, None), None, ("1 AMD GPU,", "ROCm")),
        (Machine("AMD", ("AMD",), None), Build("2.13.0", None, "7.0"), "no agent", ("no agent", "rocminfo")),
    ],
)
def test_reason_and_remedy_stand_in_one_line(machine: Machine, build: Build, error: str | None, words: tuple) -> None:
    line = why_unusable(machine, build, error=error)
    assert "\n" not in line
    assert all(word in line for word in (*words, "--device cpu")), line


@pytest.mark.parametrize(
    ("driver", "cuda", "oldest"),
    [("580.65.06", "13.0", None), ("575.57.08", "13.0", 580), ("535.129.03", "12.8", None), ("470.1", "12.4", 525),
     (None, "13.0", None), ("470.1", "99.0", None)],
)  # fmt: skip
def test_drivers_that_are_too_old(driver: str | None, cuda: str, oldest: int | None) -> None:
    assert too_old(driver, cuda) == oldest


@pytest.mark.parametrize(("value", "is_hidden"), [("", True), ("-1", True), ("0,1", False), (None, False)])
def test_gpus_that_the_user_hid(value: str | None, is_hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert hidden("NVIDIA") == is_hidden


def test_more_ranks_than_visible_gpus() -> None:
    for ranks, devices in ((4, 4), (2, 8), (4, 1), (2, 0)):  # with one visible, each rank may have been given its own
        check_share(ranks, devices, None)
    with pytest.raises(ConfigError, match=r"4 ranks .* 2 GPUs are visible \(CUDA_VISIBLE_DEVICES=0,1\).*--num_gpus 2"):
        check_share(4, 2, "0,1")


def test_device_option_reaches_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "cuda")
    parser = run_parser("dsdpo train", "")
    flags = parser.parse_args(["run.yaml", "--device", "cpu"])
    assert os.environ[CHOICE] == "cpu"
    assert not hasattr(flags, "device")
    with pytest.raises(ConfigError, match="invalid choice: 'gpu'"):
        parser.parse_args(["run.yaml", "--device", "gpu"])


def test_doctor_and_evaluate_learn_of_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a command that computes nothing has chosen the CPU because there was nothing else."""
    import torch

    from dsdpo import accelerator
    from dsdpo.run.health import _devices

    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(accelerator, "gpus_of_machine", lambda: TWO)
    monkeypatch.setattr(accelerator, "_chosen_here", set())
    accelerator.choose_accelerator(computes=False)
    assert os.environ[CHOICE] == "cpu"
    assert accelerator.unusable_gpu() is not None
    assert [finding.level for finding in _devices()] == ["red"]
    with pytest.raises(ConfigError, match="this machine has 2 NVIDIA GPUs"):
        accelerator.choose_accelerator(computes=True)
    monkeypatch.setattr(accelerator, "_chosen_here", set())  # asked for by the user
    assert accelerator.unusable_gpu() is None


def test_command_ends_before_anything_is_read_on_a_machine_whose_gpu_torch_cannot_use(tmp_path: Path) -> None:
    """The whole command, with the driver's files of a GPU machine and this machine's torch."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    nvidia(tmp_path)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    content = "model: {path: ./nowhere}\ndata: {train: nothing.jsonl}\noutput_dir: out\ndeepspeed: zero.json\n"
    (tmp_path / "run.yaml").write_text(content)
    program = (
        "import sys, pathlib, dsdpo.accelerator as a; look = a.gpus_of_machine\n"
        f"a.gpus_of_machine = lambda: look(pathlib.Path({str(tmp_path)!r}))\n"
        "from dsdpo.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    env = {name: value for name, value in os.environ.items() if name not in (CHOICE, "CUDA_VISIBLE_DEVICES")}
    command = [warm_python(), "-c", program, "train", str(tmp_path / "run.yaml")]
    refused = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"dsdpo: this machine has 2 NVIDIA GPUs ({H100}), but torch" in refused.stderr
    other = [*command[:3], "estimate", str(tmp_path / "run.yaml")]
    planned = subprocess.run(other, env=env, capture_output=True, text=True, check=False)
    assert "GPU" not in planned.stderr, "estimate computes nothing: it may run where nothing else can"
    meant = subprocess.run([*command, "--device", "cpu"], env=env, capture_output=True, text=True, check=False)
    assert meant.returncode == 2
    assert "nowhere" in meant.stderr
    assert "GPU" not in meant.stderr
