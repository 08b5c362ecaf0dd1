"""Lines of the plan on settings that a user may not have meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsdpo.config.data import SourceConfig
from dsdpo.config.run import RunConfig
from dsdpo.console import counted
from dsdpo.data.pairs import Pairs
from dsdpo.engine.elastic import shares_store
from dsdpo.reference.store import pair_keys
from dsdpo.run.models import starts_as_policy
from dsdpo.run.plan import Plan


def run_notes(plan: Plan) -> Iterator[str]:
    """What of a run's length, schedule and data may be otherwise than meant."""
    run, count = plan.run, len(plan.train.pairs)
    if run.batch.pairs_per_step > count:
        yield (
            f"batch.pairs_per_step {run.batch.pairs_per_step:,} is more than the {count:,} training pairs: each step "
            "is an epoch of them all"
        )
    yield from idle_ranks(run, plan.train.world_size)
    if (warmup := run.optimizer.num_warmup_steps(plan.total_steps)) >= plan.total_steps:
        yield (
            f"the warm-up takes {warmup:,} of {counted(plan.total_steps, 'step')}: optimizer.learning_rate "
            f"{run.optimizer.learning_rate:g} is not reached"
        )
    if warmup + (decay := run.optimizer.lr_scheduler_kwargs.get("num_decay_steps", 0)) > plan.total_steps:
        yield (
            f"warm-up and num_decay_steps take {warmup + decay:,} of {counted(plan.total_steps, 'step')} together: the "
            "learning rate jumps into the middle of its fall"
        )
    if not run.optimizer.learning_rate:
        yield "optimizer.learning_rate is 0: nothing is learned"
    if plan.sequence.spans_nodes:
        yield (
            f"distributed.sequence_parallel {plan.sequence.size}: ranks that share a row are on several nodes, whose "
            "network then carries every layer's exchange; a divisor of the ranks of a node would stay on it"
        )
    bits = plan.reference.model.quantization
    if starts_as_policy(plan) and plan.reference.own_engine and bits is not None and bits != run.model.quantization:
        yield (
            f"reference.quantization: the reference has the policy's weights in fewer bits ({bits.describe()}), so the "
            "first loss is not ln 2; how far off it is, is measured before training, printed, and kept in identity.json"
        )
    if shares_store():
        yield (
            "torchrun keeps the ranks' store where its first node was at the start, with all that is in it: when nodes "
            "go or come, ranks may not meet again. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node"
        )
    limit_s, lost_s = 60 * run.distributed.timeout_minutes, run.distributed.lost_after.total_seconds()
    if plan.train.world_size > 1 and lost_s >= limit_s:
        yield (
            f"distributed.lost_after ({lost_s:g} s) is not below distributed.timeout_minutes ({limit_s:g} s), where "
            "NCCL ends a waiting process itself: a lost rank may not be named"
        )
    yield from schedule_notes(plan)
    yield from source_notes(run)
    if plan.evaluation is not None and (shared := shared_pairs(plan.train.pairs, plan.evaluation.pairs)):
        yield (
            f"{shared:,} of the {len(plan.evaluation.pairs):,} held-out pairs are training pairs too, token for "
            "token: the held-out metrics say less than they seem to"
        )


def idle_ranks(run: RunConfig, ranks: int) -> Iterator[str]:
    """What a step of fewer pairs than there are ranks to take them means."""
    at_once = ranks // run.distributed.sequence_parallel
    if run.batch.pairs_per_step < at_once:
        yield (
            f"batch.pairs_per_step {run.batch.pairs_per_step:,} is less than the {at_once:,} pairs that "
            f"{counted(ranks, 'rank')} take at a time: the others compute what does not count"
        )


def schedule_notes(plan: Plan) -> Iterator[str]:
    """What happens at certain steps and might surprise."""
    run, sync = plan.run, plan.reference.sync
    if sync and plan.evaluation and any(plan.evaluates_after(step) for step in sync_steps(sync.every, plan)):
        yield (
            f"held-out pairs that are scored after a step at which the reference moves (every {sync.every}) are "
            "scored before it does"
        )
    if run.train.overfit_first_step:
        yield "train.overfit_first_step: every step trains on the pairs of the first one; the loss should go towards 0"


def sync_steps(every: int, plan: Plan) -> range:
    """The steps of a run after which its reference moves."""
    return range(every, plan.total_steps + 1, every)


def source_notes(run: RunConfig) -> Iterator[str]:
    """Sources that are given twice."""
    train = [source_key(source) for source in run.data.train]
    for index, source in enumerate(run.data.train):
        if source_key(source) in train[:index]:
            yield f"data.train names {source.path} twice: its rows count twice (weight: 2 says the same)"
    for source in run.data.eval or []:
        if source_key(source) in train:
            yield f"data.eval names {source.path}, which is trained on: the held-out metrics are no held-out metrics"


def source_key(source: SourceConfig) -> tuple[str, ...]:
    """Equal for sources that give the same rows."""
    path = Path(source.path).expanduser()
    place = str(path.resolve()) if path.exists() else source.path
    # A split that is not given is another for training than for evaluation, unless the path is a file of one split.
    split = source.split or ("" if path.is_file() else "default")
    return place, source.name or "", split, source.revision or ""


def shared_pairs(train: Pairs, held_out: Pairs) -> int:
    """How many held-out pairs have the tokens of a training pair."""
    shapes = {tuple(row) for row in np.unique(held_out.lengths, axis=0).tolist()}
    same_shape = [index for index, row in enumerate(train.lengths.tolist()) if tuple(row) in shapes]
    if not same_shape:
        return 0
    return int(np.isin(pair_keys(held_out), pair_keys(train, same_shape)).sum())
