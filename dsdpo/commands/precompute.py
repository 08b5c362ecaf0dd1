"""`dsdpo precompute RUN.yaml`: score all pairs with the reference now, so that training finds them in the store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dsdpo.commands.console import quiet_libraries, say
from dsdpo.config.load import load_run, run_parser
from dsdpo.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from dsdpo.commands.prepare import Plan
    from dsdpo.reference.precomputed import Filled, PrecomputedReference, Scorer


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = run_parser("dsdpo precompute", "Score all pairs of a run with its reference, into the store.")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers have to say")
    parser.add_argument(
        "--shard-pairs", type=int, default=None, help="pairs that a rank scores between writes; a kill costs as many"
    )
    run, flags = load_run(argv, parser)
    if run.reference.strategy != "precomputed":
        raise ConfigError(
            f"{flags.run}: reference.strategy is {run.reference.strategy}, under which training would not use what "
            "dsdpo precompute stores: set it to precomputed, here and for training"
        )
    if flags.shard_pairs is not None and flags.shard_pairs < 1:
        raise ConfigError(f"--shard-pairs is {flags.shard_pairs}: give 1 or more")

    from dsdpo.commands.prepare import prepare
    from dsdpo.engine.ops import prepare_ops
    from dsdpo.training.peers import watched_ranks

    quiet_libraries(verbose=flags.verbose)
    started = time.monotonic()
    plan = prepare(run, run_file=flags.run, writes_output=False)
    prepare_ops(plan.reference_config)
    with watched_ranks(lost_after=run.distributed.lost_after):
        precompute(plan, shard_rows=flags.shard_pairs)
    say(f"done in {time.monotonic() - started:.0f} s; dsdpo train with the same settings takes it from there")
    return 0


def precompute(plan: Plan, *, shard_rows: int | None = None) -> PrecomputedReference:
    """The run's reference as a table, after which nothing of its engine is left in memory. Collective."""
    from dsdpo.commands.identity import identify_reference
    from dsdpo.commands.prepare import reference_model, store_folder
    from dsdpo.engine.build import build_reference
    from dsdpo.engine.check import check_layout
    from dsdpo.engine.free import destroy_engine, used_memory
    from dsdpo.engine.lora import POLICY
    from dsdpo.reference.precomputed import PrecomputedReference, Scorer, open_store_on_ranks
    from dsdpo.reference.store import SHARD_ROWS

    run = plan.run
    before = used_memory()
    model = reference_model(run)
    engine = build_reference(model, plan.reference_config, layout=run.data.layout)
    check_layout(engine, plan.train, dtype=run.model.dtype)
    identity = identify_reference(plan, engine.module, adapter=POLICY if model.lora else None)
    folder = open_store_on_ranks(store_folder(run), identity)
    say(f"reference log-probs are kept in {folder}")
    settings = run.reference
    scorer = Scorer(engine, settings.score_tokens, settings.audit_rows, shard_rows=shard_rows or SHARD_ROWS)
    tables = [filled.table for filled in fill_tables(plan, scorer, folder, dtype=identity.dtype)]
    during = used_memory()
    destroy_engine(engine)
    del engine, scorer
    after = used_memory()
    for place in before:
        say(
            f"reference engine on rank 0: {(during[place] - before[place]) / 2**20:.0f} MiB of {place} memory while "
            f"scoring, {(after[place] - before[place]) / 2**20:.0f} MiB after"
        )
    return PrecomputedReference(tables, identity)


def fill_tables(plan: Plan, scorer: Scorer, folder: Path, *, dtype: str) -> list[Filled]:
    """The log-probs of training pairs, then of held-out pairs. Collective."""
    from dsdpo.reference.precomputed import fill_table

    filled = []
    for name, windows in (("train", plan.train), ("held-out", plan.evaluation)):
        if windows is not None:
            seed = plan.run.train.seed
            filled.append(fill_table(scorer, windows, folder, dtype=dtype, seed=seed, name=name))
            say(f"reference on {name} data: {filled[-1].describe()}")
    return filled
