"""`dsdpo precompute RUN.yaml`: score all pairs with the reference now, so that training finds them in the store."""

from __future__ import annotations

import time

from dsdpo.commands.arguments import PrecomputeArguments
from dsdpo.console import quiet_libraries, say
from dsdpo.engine.build import device
from dsdpo.engine.download import fetch_model
from dsdpo.engine.quirks.compiled_ops import prepare_ops
from dsdpo.errors import StoppedError
from dsdpo.reference.precomputed import precompute
from dsdpo.run.plan import plan_run
from dsdpo.stop_request import StopRequest, stop_code
from dsdpo.stop_signals import noted_signals
from dsdpo.time_limit import time_limit_of
from dsdpo.training.lost_ranks import watched_ranks


def main(given: PrecomputeArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=given.verbose)
    started = time.monotonic()
    plan = plan_run(given.run, run_file=given.run_file, writes_output=False)
    limit = time_limit_of(given.run.checkpoint.time_limit, None)
    stop = StopRequest(None, deadline=given.run.checkpoint.deadline, device=device(), time_limit=limit)
    try:
        with noted_signals(), watched_ranks(lost_after=given.run.distributed.lost_after):
            stop.check_signals()
            prepare_ops(plan.reference_config)
            fetch_model(plan.reference.model)
            precompute(plan, stop, shard_rows=given.shard_pairs)
    except StoppedError as stopped:
        say(f"stopped by {stopped}; what was scored is stored, go on with the same command")
        return stop_code(str(stopped))
    say(f"done in {time.monotonic() - started:.0f} s; dsdpo train with the same settings takes it from there")
    return 0
