"""`dsdpo train RUN.yaml`: a run from its settings to an exported model, told top to bottom."""

from __future__ import annotations

import time

from dsdpo.commands.arguments import TrainArguments
from dsdpo.console import is_main, quiet_libraries, say, waiting
from dsdpo.distributed import rank
from dsdpo.engine.build import device
from dsdpo.errors import DsdpoError, StoppedError
from dsdpo.run.estimate import forecast_of_plan
from dsdpo.run.estimate_report import in_three_lines
from dsdpo.run.export import export_trained
from dsdpo.run.loop import evaluate_at_start, train_until_done
from dsdpo.run.output_folder import opened_folder, parameter_counts
from dsdpo.run.plan import Plan, plan_run
from dsdpo.run.resume import checkpoint_to_resume, state_of
from dsdpo.run.run import Run, build_run
from dsdpo.run.summary import as_table, describe_plan, describe_results
from dsdpo.run_folder import RunFolder
from dsdpo.stop_request import StopRequest, record_stop, stop_code
from dsdpo.stop_signals import noted_signals
from dsdpo.time_limit import time_limit_of
from dsdpo.training.callbacks import Callbacks
from dsdpo.training.lost_ranks import watched_ranks


def main(given: TrainArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=given.verbose)
    plan = plan_run(given.run, run_file=given.run_file)
    if given.dry_run and given.run.checkpoint.resume:
        checkpoint = checkpoint_to_resume(plan)
        say(f"would go on from {checkpoint}" if checkpoint else "there is no checkpoint: would begin at step 0")
    say(describe_plan(plan))
    if given.dry_run:
        if is_main():  # one process is enough
            say(as_table(in_three_lines(*forecast_of_plan(plan))))
        return 0
    with watched_ranks(lost_after=given.run.distributed.lost_after):
        code = train(plan)
    if given.quiet and code == 0 and is_main():
        print(RunFolder(plan.run.output_dir).model)
    return code


def train(plan: Plan, callbacks: Callbacks | None = None, *, quiet: bool = False) -> int:
    """Build both engines, train, evaluate, save and export; the exit code. Collective."""
    started = time.monotonic()
    limit = time_limit_of(plan.run.checkpoint.time_limit, RunFolder(plan.run.output_dir))
    with noted_signals(), opened_folder(plan) as (folder, checkpoint, lock):
        deadline = plan.run.checkpoint.deadline
        stop = StopRequest(folder, deadline=deadline, device=device(), lock=lock, time_limit=limit)
        try:
            run = build_run(plan, folder, checkpoint, stop, callbacks)
            evaluate_at_start(run)
        except StoppedError as stopped:
            say(record_stop(folder, reason=str(stopped), step=state_of(checkpoint).step))
            return stop_code(str(stopped))
        try:
            reason = train_until_done(run)
            return finish(run, reason, quiet=quiet, started=started)
        except Exception as error:
            if isinstance(error, DsdpoError) and lock.taken_by is None:  # all ranks raise it, and the folder is ours
                run.saver.settle()
            run.tracker.fail(error)
            raise


def finish(run: Run, reason: str | None, *, quiet: bool, started: float) -> int:
    """Export what was trained, unless the run stopped early, and say how it ended; the exit code. Collective."""
    if reason is None:
        with waiting("exporting the model"):
            export_trained(run)
    run.saver.raise_if_lost()
    run.tracker.close()
    if reason is not None:
        say(record_stop(run.folder, reason=reason, step=run.state.step, save_s=run.stop.save_s))
        return stop_code(reason)
    if rank() == 0 and not quiet:  # other nodes may not see its files
        seconds = time.monotonic() - started
        say(describe_results(run.folder.path, seconds=seconds, counts=parameter_counts(run.policy)))
    return 0
