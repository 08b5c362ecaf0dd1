"""Strategy `precomputed`: every pair is scored once, before training, which then has no reference in memory."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dsdpo.config.reference import Precomputed
from dsdpo.console import counted, is_quiet, say
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.binning import MicroBatchBudget
from dsdpo.data.plan import plan_pass
from dsdpo.data.prefetch import prefetch
from dsdpo.data.steps import BatchSource
from dsdpo.distributed import all_or_none, gather_objects, local_rank, rank, sum_over_ranks
from dsdpo.engine.build import device
from dsdpo.engine.lora import POLICY
from dsdpo.engine.quirks.destroy import destroy_engine, used_memory
from dsdpo.engine.types import TrainingEngine
from dsdpo.errors import CacheError, StoppedError
from dsdpo.objective.logps import ROUNDING, PairLogps
from dsdpo.reference.base import Reference, build_checked_reference, score_batches
from dsdpo.reference.identity import ReferenceIdentity, identify_reference
from dsdpo.reference.run_plan import RunPlan
from dsdpo.reference.store import SHARD_ROWS, ShardWriter, open_store, pair_keys, read_rows
from dsdpo.run_folder import RunFolder
from dsdpo.stop_request import StopRequest
from dsdpo.time_limit import time_limit_of

log = logging.getLogger(__name__)


class PrecomputedReference(Reference):
    """Log-probs of all the run's pairs in a table, looked up by pair id."""

    def __init__(self, tables: Sequence[PairLogps], identity: ReferenceIdentity) -> None:
        """One table for each data set, in the order in which the run numbers their pairs."""
        self.identity = identity
        # On the device, 24 bytes a pair and 12 more for each completion of a list: looking up on the host would wait
        # for the device at every batch.
        self.table = PairLogps.cat(tables).to(device())

    @classmethod
    def build(cls, plan: RunPlan, policy: TrainingEngine | None) -> Reference:
        folder, settings = RunFolder(plan.run.output_dir), plan.run.checkpoint
        limit = time_limit_of(settings.time_limit, None)
        return precompute(plan, StopRequest(folder, deadline=settings.deadline, device=device(), time_limit=limit))

    def score(self, batches: Sequence[PreferenceBatch]) -> list[PairLogps]:
        # A filler pair, id -1, gets the last row: anything finite does for what weighs nothing.
        return [self.table.take(batch.pair_ids).narrowed(batch.group_size) for batch in batches]


@dataclass(frozen=True)
class ScoringJob:
    """An inference engine and the settings for scoring a data set with it."""

    engine: Callable[..., Tensor]
    score_tokens: int
    audit_rows: int
    shard_rows: int = SHARD_ROWS
    stop: StopRequest | None = None  # asked between batches


@dataclass(frozen=True)
class Filled:
    """The log-probs of one data set, and what it took to get them."""

    table: PairLogps
    scored: int  # distinct pairs that were not in the store
    audited: int
    seconds: float

    def describe(self) -> str:
        """The figures in words."""
        known = len(self.table) - self.scored
        audit = f" ({self.audited} scored again and found right)" if self.audited else ""
        speed = f", {self.scored / self.seconds:.1f} pairs/s" if self.scored else ""
        return f"{counted(len(self.table), 'pair')}, {known:,} known{audit}, {self.scored:,} scored{speed}"


def precompute(
    plan: RunPlan, stop: StopRequest, *, shard_rows: int | None = None, whose: str = "reference", data: str = "train"
) -> PrecomputedReference:
    """Score all pairs of the run with the reference engine, which is destroyed afterwards. Collective.

    `whose` is what lines call the model, `data` the pairs: any model may stand in the plan as its reference, and any
    pairs as those to train on.
    Raises `StoppedError` if it is to stop before all is scored; what has been is stored then.
    """
    settings, model = plan.reference.settings, plan.reference.model
    assert isinstance(settings, Precomputed)
    before = used_memory()
    engine, answers = build_checked_reference(plan)
    identity = identify_reference(plan, engine.module, adapter=POLICY if model.lora else None)
    folder = open_store_on_ranks(plan.store_folder, identity)
    say(f"{whose} log-probs are kept in {folder}")
    rows_a_shard = shard_rows or SHARD_ROWS
    score_tokens = settings.score_tokens * plan.sequence.size
    job = ScoringJob(engine, score_tokens, settings.audit_rows, shard_rows=rows_a_shard, stop=stop)
    tables = [filled.table for filled in fill_tables(plan, job, folder, dtype=identity.dtype, names=(whose, data))]
    during = used_memory()
    destroy_engine(engine)
    del engine, job
    after = used_memory()
    for place in before:
        say(
            f"{whose} engine on rank 0: {(during[place] - before[place]) / 2**20:.0f} MiB of {place} memory while "
            f"scoring, {(after[place] - before[place]) / 2**20:.0f} MiB after"
        )
    reference = PrecomputedReference(tables, identity)
    reference.at_start = answers
    return reference


def fill_tables(
    plan: RunPlan, job: ScoringJob, folder: Path, *, dtype: str, names: tuple[str, str] = ("reference", "train")
) -> list[Filled]:
    """The log-probs of training pairs, then of held-out pairs; `names` of model and former. Collective."""
    whose, train = names
    filled = []
    for name, windows in ((train, plan.train), ("held-out", plan.evaluation)):
        if windows is not None:
            seed = plan.run.train.seed
            filled.append(fill_table(job, windows, folder, dtype=dtype, seed=seed, name=name, whose=whose))
            say(f"{whose} on {name} data: {filled[-1].describe()}")
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


def fill_table(
    job: ScoringJob,
    windows: BatchSource,
    folder: Path,
    *,
    dtype: str,
    seed: int,
    name: str,
    whose: str = "reference",
) -> Filled:
    """Log-probs of every pair of a data set, from the store or else scored now and stored. Collective.

    Raises CacheError where stored rows are not what the engine gives.
    """
    started = time.monotonic()
    pairs = windows.pairs
    have, table = np.zeros(len(pairs), dtype=bool), PairLogps.zeros_of(len(pairs), group_size=pairs.group_size)
    with all_or_none():
        keys = pair_keys(pairs)
        if local_rank() == 0:
            have, table = read_rows(folder, keys, group_size=pairs.group_size)
    have, table = rows_of_all_nodes(have, table)
    _, index, inverse = np.unique(keys, return_index=True, return_inverse=True)
    first = index[inverse]  # a pair that stands in the data several times is scored once
    distinct = first == np.arange(len(pairs))
    missing, known = np.flatnonzero(distinct & ~have), np.flatnonzero(distinct & have)
    count = min(job.audit_rows, len(known))
    audit = np.sort(np.random.default_rng(seed).choice(known, size=count, replace=False))
    if len(audit):
        again = score_rows(job, windows, audit, label=f"audit of {name} data")
        with all_or_none():
            check_audit(table.take(audit), again, origins=pairs.origins[audit], dtype=dtype, folder=folder)
    if len(missing):
        table.put(missing, score_rows(job, windows, missing, label=f"{whose} on {name} data", folder=folder))
    return Filled(table.take(first), len(missing), len(audit), time.monotonic() - started)


def rows_of_all_nodes(have: np.ndarray, table: PairLogps) -> tuple[np.ndarray, PairLogps]:
    """Which pairs (n,) bool any rank has read, and their rows, the same on all ranks. Collective.

    Nodes whose disks are not shared each hold what their own ranks have scored. A row that several ranks have read is
    the lowest rank's.
    """
    masks = [np.unpackbits(mask, count=len(have)).astype(bool) for mask in gather_objects(np.packbits(have))]
    mine = have & ~np.logical_or.reduce([np.zeros_like(have), *masks[: rank()]])
    own = PairLogps.zeros_of(len(have), group_size=table.group_size)
    own.put(mine, table.take(mine))
    return np.logical_or.reduce(masks), _sum_of_ranks(own)


def score_rows(
    job: ScoringJob, windows: BatchSource, rows: np.ndarray, *, label: str, folder: Path | None = None
) -> PairLogps:
    """Log-probs of these rows of `windows.pairs`, on every rank, stored in `folder` as they come. Collective.

    Long pairs come first, so that what does not fit memory fails at once. A rank with less to do scores filler pairs.
    Raises `StoppedError` if it is to stop before all are scored, once those that are have been stored.
    """
    pairs = windows.pairs.subset(rows)
    windows = replace(windows, pairs=pairs, budget=MicroBatchBudget(tokens=job.score_tokens), first_pair_id=0)
    plan = plan_pass(pairs.lengths, world_size=windows.world_size, budget=windows.budget, layout=windows.layout)
    reason: str | None = None
    keeps = windows.sequence.counts  # of the ranks that share a row, one keeps its pairs
    writer = ShardWriter(folder, rank=rank(), shard_rows=job.shard_rows) if folder and keeps else None
    table = PairLogps.zeros_of(len(pairs), group_size=pairs.group_size)
    mininterval = 0.5 if sys.stderr.isatty() else 15.0  # a log file wants few lines
    bar = tqdm(
        desc=label,
        total=len(pairs),
        unit=" pairs",
        disable=rank() != 0 or is_quiet(),
        dynamic_ncols=True,
        mininterval=mininterval,
    )
    with bar, closing(prefetch(((windows.batch(ids),) for ids in plan[windows.rank]), device())) as batches:
        for index, (ids, window) in enumerate(zip(plan[windows.rank], batches, strict=True)):
            if folder is not None:
                with all_or_none():  # a full disk on one node must not leave the others waiting in a gather
                    if writer is not None:
                        writer.make_room(len(ids))
            [logps] = score_batches(job.engine, window, score_tokens=job.score_tokens)
            if ids and keeps:
                table.put(np.asarray(ids), logps)
                if writer is not None:
                    writer.append(pair_keys(pairs, ids), logps.to("cpu"))
                    log.info("rank %d: %d pairs scored and not yet written", rank(), writer.pending_rows)
            bar.update(sum(len(theirs[index]) for theirs in plan))
            reason = job.stop.reason() if job.stop is not None else None
            if reason is not None and index + 1 < len(plan[windows.rank]):
                break
            reason = None
    with all_or_none():
        if writer is not None:
            writer.flush()
    if reason is not None:
        raise StoppedError(reason)
    # Each row is zero on all ranks but the one that scored it.
    return _sum_of_ranks(table)


def _sum_of_ranks(table: PairLogps) -> PairLogps:
    return PairLogps.from_numpy({name: sum_over_ranks(column, device()) for name, column in table.numpy().items()})


def check_audit(stored: PairLogps, again: PairLogps, *, origins: np.ndarray, dtype: str, folder: Path) -> None:
    """Raises CacheError naming the first row whose stored log-prob is not, but for rounding, what was scored now."""
    share = max(share for name, share in ROUNDING.items() if name in dtype)
    old, new = stored.numpy(), again.numpy()
    for side, (values, tokens), (found, found_tokens) in _responses(old, new):
        allowed = share * (np.abs(values) + tokens)
        wrong = ~(np.abs(values - found) <= allowed) | (tokens != found_tokens)
        if wrong.any():
            row = int(wrong.argmax())
            source, place = origins[row]
            raise CacheError(
                f"{folder}: the stored log-prob of the {side} response of row {place} of source {source} is "
                f"{values[row]:.4f} nats over {tokens[row]} tokens, but the reference gives {found[row]:.4f} "
                f"over {found_tokens[row]}, and rounding in {dtype} explains {allowed[row]:.4f}; {wrong.sum()} of "
                f"{len(stored)} audited rows are off. Nothing of this store is used: delete the folder to score "
                "everything again, or set reference.store to another"
            )


def _responses(*tables: Mapping[str, np.ndarray]) -> Iterator[tuple[Any, ...]]:
    """A word for each response of a row, and its log-probs and tokens (n,) in each table."""
    if "responses" not in tables[0]:
        for side in ("chosen", "rejected"):
            yield side, *((table[side], table[f"{side}_tokens"]) for table in tables)
        return
    for place in range(tables[0]["responses"].shape[1]):
        yield f"{place + 1}.", *((table["responses"][:, place], table["response_tokens"][:, place]) for table in tables)
