"""`dsdpo precompute RUN.yaml`: score all pairs with the reference now, so that training finds them in the store."""

from __future__ import annotations

import time

from dsdpo.commands.arguments import PrecomputeArguments
from dsdpo.console import quiet_libraries, say
from dsdpo.engine.quirks.compiled_ops import prepare_ops
from dsdpo.reference.precomputed import precompute
from dsdpo.run.plan import plan_run
from dsdpo.training.lost_ranks import watched_ranks


def main(given: PrecomputeArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=given.verbose)
    started = time.monotonic()
    plan = plan_run(given.run, run_file=given.run_file, writes_output=False)
    prepare_ops(plan.reference_config)
    with watched_ranks(lost_after=given.run.distributed.lost_after):
        precompute(plan, shard_rows=given.shard_pairs)
    say(f"done in {time.monotonic() - started:.0f} s; dsdpo train with the same settings takes it from there")
    return 0
