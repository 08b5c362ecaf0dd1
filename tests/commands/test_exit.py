"""How a process ends: with its own exit code, whatever libraries' threads are doing, and together with other ranks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from dsdpo.__main__ import main
from tests.commands.processes import finish
from tests.ranks import run_ranks

LIMIT_S = 240
# A thread that keeps coming back from C++ to Python, as those of gloo, TCPStore and pyarrow do: an interpreter that is
# taken apart meanwhile dies of SIGABRT.
BUSY_THREAD = """
import atexit, sys, threading, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, 1, True)
def ask():
    while True:
        store.check(["x"])
for _ in range(4):
    threading.Thread(target=ask, daemon=True).start()
atexit.register(print, "closed")
time.sleep(0.2)
"""


def test_exit_code_is_ours_while_threads_of_libraries_still_run() -> None:
    code = BUSY_THREAD + "import dsdpo.__main__ as m; sys.stdout.write('said, '); m.end_process(2, waits=True)"
    answer = finish([sys.executable, "-c", code], limit_s=LIMIT_S)
    assert (answer.returncode, answer.stdout, answer.stderr) == (2, "said, closed\n", "")


@pytest.mark.parametrize(
    ("name", "said"), [("trian", "'trian'; did you mean train? There"), ("qqq", "'qqq'. There are")]
)
def test_a_mistyped_command_is_told_what_there_is(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert f"dsdpo: no command {said}" in capsys.readouterr().err


def test_unforeseen_error_ends_with_1_and_a_traceback_while_threads_still_run() -> None:
    code = BUSY_THREAD + "import dsdpo.__main__ as m; m.main = lambda: 1 / 0; m.entry()"
    answer = finish([sys.executable, "-c", code], limit_s=LIMIT_S)
    assert answer.returncode == 1
    assert "ZeroDivisionError" in answer.stderr
    assert "terminate called" not in answer.stderr


def test_help_ends_with_0_and_imports_no_torch() -> None:
    code = "import dsdpo.__main__ as m, atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); m.entry()"
    answer = finish([sys.executable, "-c", code, "train", "--help"], limit_s=LIMIT_S)
    assert answer.returncode == 0
    assert answer.stdout.endswith("False\n")


@pytest.mark.parametrize("words", [["--help"], ["train", "run.yaml"]])
def test_a_folder_that_is_gone_is_told(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        tmp_path.rmdir()
        assert main(words) == 2
    finally:
        os.chdir(before)
    assert "the folder that this was started in is gone" in capsys.readouterr().err


def test_rank_0_ends_last_within_the_time_limit() -> None:
    assert run_ranks(2, part_here) == [True, True]


def part_here() -> bool:
    """Rank 1 comes a second late; rank 0 has waited for it, but not for a rank that never comes."""
    from dsdpo.distributed import part

    dist.barrier()
    started = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(1.0)
    part(60.0)
    waited = time.monotonic() - started
    return 1.0 <= waited < 50.0
