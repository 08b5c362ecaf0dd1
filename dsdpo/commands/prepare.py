"""`dsdpo prepare RUN.yaml`: make the tokens of a run's data now, on a machine without a GPU if need be."""

from __future__ import annotations

import time

from dsdpo.config.load import load_run, run_parser
from dsdpo.console import quiet_libraries, say


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = run_parser("dsdpo prepare", "Tokenize a run's data into data.cache_dir; no model and no DeepSpeed needed.")
    run, flags = load_run(argv, parser)
    quiet_libraries(verbose=False)

    from dsdpo.run.datasets import prepare_data

    started = time.monotonic()
    for line in prepare_data(run):
        say(line)
    say(f"done in {time.monotonic() - started:.0f} s; dsdpo train {flags.run} takes it from there")
    return 0
