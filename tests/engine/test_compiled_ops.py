"""Compiled operators: what a killed build leaves behind never stops a later start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsdpo.engine.quirks.compiled_ops import _processes_in, build_folder, prepare_ops, remove_stale_lock
from dsdpo.errors import ConfigError
from tests.ranks import restart, run_ranks

LIMIT_S = 300


def locked(folder: Path) -> Path:
    """The lock that torch makes in a build folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    lock.touch()
    return lock


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_missing_library_is_one_message_and_nothing_beside_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A linker that fails, as without libaio."""
    monkeypatch.setenv("LDFLAGS", "-no-such-option-of-a-linker")
    nvme = {"zero_optimization": {"offload_param": {"device": "nvme"}}, "optimizer": {"type": "SGD", "params": {}}}
    with pytest.raises(ConfigError, match=r"async_io operator cannot be built on this machine: install libaio"):
        prepare_ops(nvme)
    assert capfd.readouterr() == ("", "")


def test_no_lock_is_nothing_to_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not remove_stale_lock(tmp_path)
    assert capsys.readouterr().out == ""


def test_lock_without_owner_is_named_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = locked(tmp_path)
    assert remove_stale_lock(tmp_path, patience_s=0.3)
    assert not lock.exists()
    assert f"removing the lock of a build that was killed: {lock}" in capsys.readouterr().out


def test_live_build_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A build far longer than our patience, whose compiler stands in the folder as ninja's do."""
    lock = locked(tmp_path)
    with subprocess.Popen(["bash", "-c", "sleep 3; rm lock"], cwd=tmp_path) as build:
        assert not remove_stale_lock(tmp_path, patience_s=0.3)
        assert build.wait(LIMIT_S) == 0
    assert not lock.exists()
    assert f"waiting for another process that is compiling in {tmp_path} (pid {build.pid}" in capsys.readouterr().out


def test_build_that_dies_while_waited_for(tmp_path: Path) -> None:
    lock = locked(tmp_path)
    with subprocess.Popen(["bash", "-c", "sleep 1; kill -9 $$"], cwd=tmp_path):
        assert remove_stale_lock(tmp_path, patience_s=0.3)
    assert not lock.exists()


def test_build_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert build_folder("cpu_adam") == tmp_path / "cpu_adam"


def compiler(path: Path, script: str) -> str:
    """A C++ compiler that does something first, and does not optimize: what it makes is used once."""
    path.write_text(f'#!/bin/bash\n{script}\nexec c++ "$@" -O0 -g0\n')
    path.chmod(0o755)
    return str(path)


# What other tests' runs have compiled of the same file is the object that this build would make.
COPIES = """
source=${{@: -3:1}} object={made}/$(basename "${{@: -3:1}}" .cpp).o
if [[ "$*" == *" -c "* && -f {made}/cpu_adam.so && $object -nt $source ]]; then exec cp "$object" "${{@: -1}}"; fi
"""


def test_killed_compilation_then_two_ranks_that_recover(tmp_path: Path) -> None:
    """The real cpu_adam: SIGKILL while its compiler runs; the next start names the lock and compiles exactly once."""
    extensions, log = tmp_path / "extensions", tmp_path / "compiled"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)}
    environment["CXX"] = compiler(tmp_path / "slow", f'[[ "$*" == *" -c "* ]] && touch {log} && sleep 600')
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    code = f"from dsdpo.engine.quirks.compiled_ops import prepare_ops; prepare_ops({config})"
    build = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until(log.exists)
    finally:
        os.killpg(build.pid, signal.SIGKILL)
        for compiling in _processes_in(extensions / "cpu_adam"):  # ninja gives each a process group of its own
            os.kill(compiling, signal.SIGKILL)
    said, _ = build.communicate(timeout=LIMIT_S)
    assert f"compiling DeepSpeed's cpu_adam into {extensions / 'cpu_adam'}" in said
    lock = extensions / "cpu_adam" / "lock"
    assert lock.exists(), "the kill left no lock, so nothing was tested"

    log.unlink()
    count = f'[[ "$*" == *" -c "*cpu_adam.cpp* ]] && echo one >> {log}'
    counting = compiler(tmp_path / "counting", f"{count}\n{COPIES.format(made=build_folder('cpu_adam'))}")
    restart(2)  # an operator that a process has loaded is not built again
    try:
        said_by_rank = run_ranks(2, prepare_here, config, str(extensions), counting)
    finally:
        restart(2)
    assert not lock.exists()
    assert log.read_text() == "one\n"
    assert f"removing the lock of a build that was killed: {lock}" in said_by_rank[0]
    assert "compiling DeepSpeed's cpu_adam" in said_by_rank[0]
    assert "compiled cpu_adam in " in said_by_rank[0]
    assert said_by_rank[1] == ""


def prepare_here(config: dict, extensions: str, cxx: str) -> str:
    """What `prepare_ops` puts on the screen in a process that never built anything; the operator works."""
    from tests.commands.processes import captured

    os.environ |= {"TORCH_EXTENSIONS_DIR": extensions, "CXX": cxx}
    with captured(1) as output:
        from dsdpo.engine.quirks.compiled_ops import prepare_ops

        prepare_ops(config)
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    DeepSpeedCPUAdam([weight], lr=0.5).step()
    assert torch.allclose(weight, torch.full((4,), 0.5), atol=1e-3)
    return output.read_text()
