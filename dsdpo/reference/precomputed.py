"""Strategy `precomputed`: every pair is scored once, before training, which then has no reference in memory."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsdpo.config.reference import Precomputed
from dsdpo.console import say
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.binning import MicroBatchBudget
from dsdpo.data.plan import plan_pass
from dsdpo.data.prefetch import prefetch
from dsdpo.data.steps import BatchSource
from dsdpo.distributed import all_or_none, broadcast_array, broadcast_object, rank, sum_over_ranks
from dsdpo.engine.build import build_reference, device
from dsdpo.engine.layout_check import check_layout
from dsdpo.engine.lora import POLICY
from dsdpo.engine.quirks.destroy import destroy_engine, used_memory
from dsdpo.errors import CacheError
from dsdpo.objective.logps import ROUNDING, PairLogps
from dsdpo.reference.base import Reference, score_batches
from dsdpo.reference.identity import ReferenceIdentity, identify_reference
from dsdpo.reference.run_plan import RunPlan
from dsdpo.reference.store import SHARD_ROWS, LogpTable, ShardWriter, open_store, pair_keys, read_rows

log = logging.getLogger(__name__)


class PrecomputedReference(Reference):
    """Log-probs of all the run's pairs in a table, looked up by pair id."""

    def __init__(self, tables: Sequence[LogpTable], identity: ReferenceIdentity) -> None:
        """One table for each data set, in the order in which the run numbers their pairs."""
        self.identity = identity
        # On the device, 16 bytes a pair: looking up on the host would wait for the device at every batch.
        self._logps = torch.from_numpy(np.concatenate([table.logps for table in tables])).to(device())
        self._tokens = torch.from_numpy(np.concatenate([table.tokens for table in tables])).to(device())

    @classmethod
    def build(cls, plan: RunPlan, policy: Any) -> Reference:
        return precompute(plan)

    def score(self, window: Sequence[PreferenceBatch]) -> list[PairLogps]:
        return [self._look_up(batch.pair_ids) for batch in window]

    def _look_up(self, pair_ids: Tensor) -> PairLogps:
        # A filler pair, id -1, gets the last row: anything finite does for what weighs nothing.
        rows = pair_ids.to(self._logps.device)
        logps, tokens = self._logps[rows].to(pair_ids.device), self._tokens[rows].long().to(pair_ids.device)
        return PairLogps(logps[:, 0], logps[:, 1], tokens[:, 0], tokens[:, 1])


@dataclass(frozen=True)
class Scorer:
    """An inference engine, and how to score a whole data set with it."""

    engine: Callable[..., Tensor]
    score_tokens: int
    audit_rows: int
    shard_rows: int = SHARD_ROWS


@dataclass(frozen=True)
class Filled:
    """What became of one data set."""

    table: LogpTable
    scored: int  # distinct pairs that were not in the store
    audited: int
    seconds: float

    def describe(self) -> str:
        """The figures in words."""
        known = len(self.table) - self.scored
        audit = f" ({self.audited} scored again and found right)" if self.audited else ""
        speed = f", {self.scored / self.seconds:.1f} pairs/s" if self.scored else ""
        return f"{len(self.table):,} pairs, {known:,} known{audit}, {self.scored:,} scored{speed}"


def precompute(plan: RunPlan, *, shard_rows: int | None = None) -> PrecomputedReference:
    """The run's reference as a table, after which nothing of its engine is left in memory. Collective."""
    settings, model = plan.reference.settings, plan.reference.model
    assert isinstance(settings, Precomputed)
    before = used_memory()
    engine = build_reference(model, plan.reference_config, layout=plan.run.data.layout)
    check_layout(engine, plan.train, dtype=model.dtype)
    identity = identify_reference(plan, engine.module, adapter=POLICY if model.lora else None)
    folder = open_store_on_ranks(plan.store_folder, identity)
    say(f"reference log-probs are kept in {folder}")
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


def fill_tables(plan: RunPlan, scorer: Scorer, folder: Path, *, dtype: str) -> list[Filled]:
    """The log-probs of training pairs, then of held-out pairs. Collective."""
    filled = []
    for name, windows in (("train", plan.train), ("held-out", plan.evaluation)):
        if windows is not None:
            seed = plan.run.train.seed
            filled.append(fill_table(scorer, windows, folder, dtype=dtype, seed=seed, name=name))
            say(f"reference on {name} data: {filled[-1].describe()}")
    return filled


def open_store_on_ranks(store: Path, identity: ReferenceIdentity) -> Path:
    """This reference's folder below `store`, on every node. Collective. Raises CacheError."""
    folder = None
    with all_or_none():
        if rank() == 0:
            folder = open_store(store, identity)
    with all_or_none():
        folder = folder or open_store(store, identity)
    return folder


def fill_table(scorer: Scorer, windows: BatchSource, folder: Path, *, dtype: str, seed: int, name: str) -> Filled:
    """Log-probs of every pair of a data set, from the store or else scored now and stored. Collective.

    Rank 0 alone reads, so that no rank can decide otherwise than the others; rows travel by broadcast, as other nodes
    may not see its files. Raises CacheError where stored rows are not what the engine gives.
    """
    started = time.monotonic()
    pairs = windows.pairs
    table, first = LogpTable.zeros(len(pairs)), np.arange(len(pairs))
    wanted, audit = np.zeros(len(pairs), dtype=bool), np.zeros(0, dtype=np.int64)
    with all_or_none():
        if rank() == 0:
            keys = pair_keys(pairs)
            _, index, inverse = np.unique(keys, return_index=True, return_inverse=True)
            first = index[inverse]  # a pair that stands in the data several times is scored once
            have, table = read_rows(folder, keys)
            wanted = ~have & (first == np.arange(len(pairs)))
            known = np.flatnonzero(have & (first == np.arange(len(pairs))))
            count = min(scorer.audit_rows, len(known))
            audit = np.sort(np.random.default_rng(seed).choice(known, size=count, replace=False))
    packed, audit = broadcast_object((np.packbits(wanted), audit))
    missing = np.flatnonzero(np.unpackbits(packed, count=len(pairs)))
    if len(audit):
        again = score_rows(scorer, windows, audit, label=f"audit of {name} data")
        with all_or_none():
            if rank() == 0:
                check_audit(table[audit], again, origins=pairs.origins[audit], dtype=dtype, folder=folder)
    if len(missing):
        new = score_rows(scorer, windows, missing, label=f"reference on {name} data", folder=folder)
        table[missing] = new
    table = table[first]
    table = LogpTable(broadcast_array(table.logps, device()), broadcast_array(table.tokens, device()))
    return Filled(table, len(missing), len(audit), time.monotonic() - started)


def score_rows(
    scorer: Scorer, windows: BatchSource, rows: np.ndarray, *, label: str, folder: Path | None = None
) -> LogpTable:
    """Log-probs of these rows of `windows.pairs`, on every rank, stored in `folder` as they come. Collective.

    Long pairs come first, so that what does not fit memory fails at once. A rank with less to do scores filler pairs.
    """
    pairs = windows.pairs.subset(rows)
    windows = replace(windows, pairs=pairs, budget=MicroBatchBudget(tokens=scorer.score_tokens), first_pair_id=0)
    plan = plan_pass(pairs.lengths, world_size=windows.world_size, budget=windows.budget, layout=windows.layout)
    writer = ShardWriter(folder, rank=rank(), shard_rows=scorer.shard_rows) if folder else None
    table = LogpTable.zeros(len(pairs))
    mininterval = 0.5 if sys.stderr.isatty() else 15.0  # a log file wants few lines
    bar = tqdm(
        desc=label, total=len(pairs), unit=" pairs", disable=rank() != 0, dynamic_ncols=True, mininterval=mininterval
    )
    with bar, closing(prefetch(((windows.batch(ids),) for ids in plan[windows.rank]), device())) as batches:
        for index, (ids, window) in enumerate(zip(plan[windows.rank], batches, strict=True)):
            if writer is not None:
                with all_or_none():  # a full disk on one node must not leave the others waiting in a gather
                    writer.make_room(len(ids))
            [logps] = score_batches(scorer.engine, window, score_tokens=scorer.score_tokens)
            if ids:
                table[list(ids)] = _to_rows(logps)
                if writer is not None:
                    writer.append(pair_keys(pairs, ids), table[list(ids)])
                    log.info("rank %d: %d pairs scored and not yet written", rank(), writer.pending_rows)
            bar.update(sum(len(theirs[index]) for theirs in plan))
    with all_or_none():
        if writer is not None:
            writer.flush()
    # Each row is zero on all ranks but the one that scored it.
    return LogpTable(sum_over_ranks(table.logps, device()), sum_over_ranks(table.tokens, device()))


def check_audit(stored: LogpTable, again: LogpTable, *, origins: np.ndarray, dtype: str, folder: Path) -> None:
    """Raises CacheError naming the first row whose stored log-prob is not, but for rounding, what was scored now."""
    allowed = max(share for name, share in ROUNDING.items() if name in dtype) * (np.abs(stored.logps) + stored.tokens)
    wrong = ~(np.abs(stored.logps - again.logps) <= allowed) | (stored.tokens != again.tokens)
    if wrong.any():
        row, side = np.argwhere(wrong)[0]
        source, place = origins[row]
        raise CacheError(
            f"{folder}: the stored log-prob of the {('chosen', 'rejected')[side]} response of row {place} of source "
            f"{source} is {stored.logps[row, side]:.4f} nats over {stored.tokens[row, side]} tokens, but the reference "
            f"gives {again.logps[row, side]:.4f} over {again.tokens[row, side]}, and rounding in {dtype} explains "
            f"{allowed[row, side]:.4f}; {wrong.any(axis=1).sum()} of {len(stored)} audited rows are off. Nothing of "
            "this store is used: delete the folder to score everything again, or set reference.store to another"
        )


def _to_rows(logps: PairLogps) -> LogpTable:
    return LogpTable(
        torch.stack([logps.chosen, logps.rejected], dim=1).float().cpu().numpy(),
        torch.stack([logps.chosen_tokens, logps.rejected_tokens], dim=1).to(torch.int32).cpu().numpy(),
    )
