"""`dsdpo compare RUN.yaml`: short real trials under several DeepSpeed JSONs; `dsdpo compare RUN RUN`: finished runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsdpo.accelerator import CHOICE, choose_accelerator
from dsdpo.atomic import write_text
from dsdpo.commands.arguments import CompareArguments, FinishedArguments
from dsdpo.commands.estimate import row_of
from dsdpo.config.reference_plan import plan_reference
from dsdpo.console import quiet_libraries, say
from dsdpo.errors import ConfigError
from dsdpo.run import side_by_side
from dsdpo.run.estimate import subject_of, this_machine
from dsdpo.run.series import load_series
from dsdpo.run.trial import run_trial
from dsdpo.run.trial_process import REFUSED, Outcome, try_run
from dsdpo.run.trial_report import Tried, as_json, best_of, suggestion, table

NOTHING_FITS = 1  # exit code


def main(given: CompareArguments | FinishedArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=False)
    if isinstance(given, FinishedArguments):
        runs = load_series(given.folders)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(
            json.dumps(side_by_side.as_json(runs), indent=1) if given.as_json else side_by_side.table(runs, width=width)
        )
        return 0
    choose_accelerator(computes=True)
    if given.trial is not None:
        run_trial(given.run, given.trial, run_file=given.run_file)
        return 0
    return compare(given)


def compare(given: CompareArguments) -> int:
    """Try every pair of JSONs, then say which is best; the exit code."""
    ranks = given.ranks or default_ranks()
    subject = subject_of(given.run, given.run_file, tokens=None, ranks=ranks)
    machine = this_machine(ranks=ranks, per_node=ranks)
    own = "derived" if plan_reference(given.run).own_engine else "none"
    pairs = [(policy, reference) for policy in given.policies for reference in given.references]
    tried = []
    with trials_folder(given.keep) as folder:
        for number, (policy, reference) in enumerate(pairs, start=1):
            row = row_of(subject, machine, policy, reference)
            outcome = Outcome(REFUSED, reason=row.refused)
            if row.forecast is not None:  # else training would say the same, once its processes are there
                outcome = try_run(
                    given.run,
                    folder / f"trial-{number}",
                    run_file=given.run_file,
                    policy=policy,
                    reference=reference,
                    ranks=ranks,
                    steps=given.steps,
                    limit_s=given.limit_s,
                )
            tried.append(Tried(policy, reference, outcome, row.forecast))
            progress = f"trial {number} of {len(pairs)}, {tried[-1].describe(own)}: fits: {outcome.ended}"
            print(progress, file=sys.stderr, flush=True)
    best = best_of(tried)
    if best is not None:
        lines = suggestion(best, machine, run_file=str(given.run_file), steps=given.steps)
        try:
            write_text(given.out, lines)
        except OSError as error:
            print(lines)  # minutes of trials are not lost for a full disk
            raise ConfigError(f"--out: {given.out} cannot be written: {error}; the suggestion stands above") from error
    if given.as_json:
        print(json.dumps(as_json(tried, machine), indent=1))
        return 0 if best else NOTHING_FITS
    say(f"{given.steps} steps each on {machine.ranks} x {machine.gpu.name}; (est.) is what dsdpo estimate says\n")
    say(table(tried, machine, own=own))
    if best is None:
        say(f"\nnone fits: dsdpo estimate {given.run_file} says what to change")
        return NOTHING_FITS
    say(f"\n{lines}\nwritten to {given.out}: put these lines into {given.run_file}")
    return 0


def default_ranks() -> int:
    """One for each GPU of this machine, without any two."""
    import torch

    return (0 if os.environ.get(CHOICE) == "cpu" else torch.cuda.device_count()) or 2


@contextmanager
def trials_folder(keep: Path | None) -> Iterator[Path]:
    """An empty folder for trials: the one to keep, or one that goes away."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="dsdpo-compare-") as made:
        yield Path(made)
