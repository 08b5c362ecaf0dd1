"""`dsdpo prepare RUN.yaml`: make the tokens of a run's data now, on a machine without a GPU if need be."""

from __future__ import annotations

import time

from dsdpo.commands.arguments import PrepareArguments
from dsdpo.console import quiet_libraries, say
from dsdpo.run.datasets import prepare_data


def main(given: PrepareArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=False)
    started = time.monotonic()
    for line in prepare_data(given.run):
        say(line)
    say(f"done in {time.monotonic() - started:.0f} s; dsdpo train {given.run_file} takes it from there")
    return 0
