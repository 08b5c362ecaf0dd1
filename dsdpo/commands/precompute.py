"""`dsdpo precompute RUN.yaml`: score all pairs with the reference now, so that training finds them in the store."""

from __future__ import annotations

import time

from dsdpo.config.load import check_deepspeed_files, load_run, run_parser
from dsdpo.console import quiet_libraries, say
from dsdpo.errors import ConfigError


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = run_parser("dsdpo precompute", "Score all pairs of a run with its reference, into the store.")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers have to say")
    parser.add_argument(
        "--shard-pairs", type=int, default=None, help="pairs that a rank scores between writes; a kill costs as many"
    )
    run, flags = load_run(argv, parser)
    check_deepspeed_files(run)
    if run.reference.strategy != "precomputed":
        raise ConfigError(
            f"{flags.run}: reference.strategy is {run.reference.strategy}, under which training would not use what "
            "dsdpo precompute stores: set it to precomputed, here and for training"
        )
    if flags.shard_pairs is not None and flags.shard_pairs < 1:
        raise ConfigError(f"--shard-pairs is {flags.shard_pairs}: give 1 or more")

    from dsdpo.engine.quirks.compiled_ops import prepare_ops
    from dsdpo.reference.precomputed import precompute
    from dsdpo.run.plan import plan_run
    from dsdpo.training.lost_ranks import watched_ranks

    quiet_libraries(verbose=flags.verbose)
    started = time.monotonic()
    plan = plan_run(run, run_file=flags.run, writes_output=False)
    prepare_ops(plan.reference_config)
    with watched_ranks(lost_after=run.distributed.lost_after):
        precompute(plan, shard_rows=flags.shard_pairs)
    say(f"done in {time.monotonic() - started:.0f} s; dsdpo train with the same settings takes it from there")
    return 0
