"""What the screen shows in a long silence, and that nothing is said where the user wants it quiet."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from dsdpo import console
from tests.commands.processes import environment_of

WAITS = """
import time
from dsdpo import console

console.SILENCE_S.update({True: 0.2, False: 0.2})
with console.waiting("loading"):
    time.sleep(0.1)  # too short to be worth a word
print("first", flush=True)
with console.waiting("compiling"):
    time.sleep(1.6)
print("second", flush=True)
"""


def test_a_log_file_gets_a_line_of_what_takes_long() -> None:
    said = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, env=environment_of())
    assert said.returncode == 0, said.stderr
    lines = re.findall(r"^compiling \.\.\. \d+ s$", said.stderr, re.MULTILINE)
    assert 1 <= len(lines) <= 3, "each pause is as long as what has passed"
    assert "loading" not in said.stderr
    assert said.stdout == "first\nsecond\n"


def test_a_terminal_gets_a_line_that_goes_away() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", WAITS], stderr=theirs, stdout=subprocess.PIPE, env=environment_of()):
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 4096):
                said += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert re.search(rb"\rcompiling \.\.\. \d+ s", said)
    assert said.rstrip().endswith(b"\x1b[K")
    assert b"loading" not in said


QUIET = """
from dsdpo import console

console.be_quiet()
console.say("a word")
with console.waiting("loading"):
    print("the command's own answer")
"""


def test_nothing_is_said_in_quiet() -> None:
    said = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, env=environment_of())
    assert (said.returncode, said.stdout, said.stderr) == (0, "the command's own answer\n", "")


def test_how_long_it_took_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dsdpo.console"), console.waiting("loading"):
        time.sleep(0.05)
    [line] = caplog.messages
    assert re.fullmatch(r"loading: \d\.\d\d s", line)
    assert float(line.split()[1]) >= 0.05
