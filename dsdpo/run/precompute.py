"""The `precomputed` strategy's scoring pass: an engine, its table of log-probs, then nothing of the engine."""

from __future__ import annotations

from pathlib import Path

from dsdpo.console import say
from dsdpo.engine.build import build_reference
from dsdpo.engine.layout_check import check_layout
from dsdpo.engine.lora import POLICY
from dsdpo.engine.quirks.destroy import destroy_engine, used_memory
from dsdpo.reference.precomputed import Filled, PrecomputedReference, Scorer, fill_table, open_store_on_ranks
from dsdpo.reference.store import SHARD_ROWS
from dsdpo.run.identity import identify_reference
from dsdpo.run.plan import Plan, reference_model, store_folder


def precompute(plan: Plan, *, shard_rows: int | None = None) -> PrecomputedReference:
    """The run's reference as a table, after which nothing of its engine is left in memory. Collective."""
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
    filled = []
    for name, windows in (("train", plan.train), ("held-out", plan.evaluation)):
        if windows is not None:
            seed = plan.run.train.seed
            filled.append(fill_table(scorer, windows, folder, dtype=dtype, seed=seed, name=name))
            say(f"reference on {name} data: {filled[-1].describe()}")
    return filled
