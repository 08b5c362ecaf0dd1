"""A run's data sets: prepared once per node, opened by every rank, the same on all nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from transformers import PretrainedConfig

from dsdpo.config.data import SourceConfig
from dsdpo.config.run import RunConfig
from dsdpo.console import counted, say
from dsdpo.data.binning import LayoutName, MicroBatchBudget, longest_sequences
from dsdpo.data.dates import settled_date
from dsdpo.data.pairs import Pairs, SourceFacts, open_pairs, with_mismatched, with_nothing_beside
from dsdpo.data.sources import SECTIONS, DefaultSplit
from dsdpo.data.steps import BatchSource
from dsdpo.data.tokenize import prepare_pairs
from dsdpo.data.tokenizer import load_tokenizer, pad_id
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import (
    all_or_none,
    broadcast_object,
    by_host,
    gather_objects,
    local_rank,
    node,
    on_some_ranks,
    rank,
)
from dsdpo.engine.rope import longest_allowed
from dsdpo.errors import ConfigError, DataError
from dsdpo.sequence_group import SequenceGroup
from dsdpo.training.checkpoint import read_state
from dsdpo.training.resume import find_checkpoint

NAMES_SHOWN = 5  # files that a line names


def prepare_windows(
    run: RunConfig,
    sources: list[SourceConfig],
    split: DefaultSplit,
    tokenizer: Tokenizer,
    model: PretrainedConfig,
    layout: LayoutName,
    sequence: SequenceGroup,
) -> BatchSource:
    """The token pairs of some sources, prepared by one rank of each node and opened by all. Collective."""
    prepare = partial(prepare_pairs, sources, tokenizer, data=run.data, seed=run.train.seed, default_split=split)
    folder = on_some_ranks(local_rank() == 0, prepare)
    folders = gather_objects((node(), folder))
    pairs = open_pairs(next(path for where, path in folders if path is not None and where == node()))
    check_kind(pairs, split, run)
    if run.loss.rows == "rated":
        longest, key = run.data.max_length, SECTIONS[split]
        pairs = with_mismatched(pairs, longest, key=key) if run.loss.mismatched else with_nothing_beside(pairs)
    check_pairs(pairs, split, run, model)
    tokens = run.batch.tokens_per_micro_batch * sequence.size
    return BatchSource(
        pairs=pairs,
        budget=MicroBatchBudget(tokens=tokens, pairs=run.batch.pairs_per_micro_batch),
        layout=layout,
        pad_token_id=pad_id(tokenizer),
        rank=sequence.number,
        world_size=sequence.groups,
        sequence=sequence,
    )


def with_date(run: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The run with the date that its chat template is told, if that asks: a resumed run's own. Collective."""
    settled = None
    with all_or_none():
        if rank() == 0:
            settled = settled_date(run.data, tokenizer)
    found: str | None = broadcast_object(settled)
    if found is None:
        return run
    checkpoint, _ = find_checkpoint(run)
    if checkpoint is not None and run.data.date is None:
        found = read_state(checkpoint)["settings"]["data"].get("date") or found
    return run.model_copy(update={"data": run.data.model_copy(update={"date": found})})


def prepare_data(run: RunConfig) -> Iterator[str]:
    """Prepare the data of a run in this process; what became of it, in lines. No model is read but its tokenizer.

    Raises `ConfigError` or `DataError`.
    """
    tokenizer = load_tokenizer(run.model)
    run = with_date(run, tokenizer)
    parts: list[tuple[str, list[SourceConfig] | None, DefaultSplit]] = [
        ("held-out", run.data.eval, "test"), ("training", run.data.train, "train"),
    ]  # fmt: skip
    for name, sources, split in parts:
        if sources:
            folder = prepare_pairs(sources, tokenizer, data=run.data, seed=run.train.seed, default_split=split)
            pairs = open_pairs(folder)
            if pairs.report.text:
                yield f"{name} data: {pairs.report.text}"
            yield f"{name} data: {counted(len(pairs), 'pair')} in {folder}"
            yield from (f"  {line}" for line in describe_sources(pairs, sources))


def describe_sources(pairs: Pairs, configs: Sequence[SourceConfig]) -> Iterator[str]:
    """What became of each source's rows, in a line."""
    for facts, config in zip(pairs.sources, configs, strict=True):
        yield _described(facts, config)


def _described(source: SourceFacts, config: SourceConfig) -> str:
    """Under the name that this run has for the source: pairs on disk may have been prepared by another."""
    dropped = ", ".join(f"{count:,} {kind}" for kind, count in source.dropped.items())
    name = f"{config.path} {config.split}" if config.split else config.path
    alone = len(source.files) == 1 and config.path.endswith(source.files[0])
    read = "" if alone or not source.files else f" ({_names(source.files)})"
    return (
        f"{name}{read}: {counted(source.rows, 'row')}, {counted(source.pairs, 'pair')}, "
        f"{source.tokens:,} tokens, dropped {dropped or 'none'}, {source.truncated:,} truncated, "
        f"{counted(source.duplicates, 'duplicate')}" + (f"; not read: {_names(source.unread)}" if source.unread else "")
    )


def _names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def check_kind(pairs: Pairs, split: DefaultSplit, run: RunConfig) -> None:
    """Raise `DataError` unless the rows are of the kind that the loss is defined for."""
    size, rows = pairs.group_size, run.loss.rows
    loss = " + ".join(run.loss.types)
    if size > 2 if rows == "lists" else size == {"pairs": 2, "rated": 1}[rows]:
        return
    kind = {1: "one rated completion", 2: "chosen and rejected"}.get(size, f"up to {size} completions")
    if rows == "rated":
        raise DataError(
            f"{SECTIONS[split]}: {kind} a row, but loss.type {loss} is for single rated completions: give rows with "
            "prompt, completion and label, or set loss.type to a loss of pairs such as sigmoid or apo_zero"
        )
    if rows == "lists":
        raise DataError(
            f"{SECTIONS[split]}: {kind} a row, but loss.type {loss} is for lists of 3 or more completions: give rows "
            "with completions and scores and set data.pairing to list, or set loss.type to a loss of pairs such as "
            "sigmoid"
        )
    remedy = "set loss.type to kto" if size == 1 else "set data.pairing to best_worst, or loss.type to plackett_luce"
    raise DataError(
        f"{SECTIONS[split]}: {kind} a row, but loss.type {loss} compares pairs: give rows with chosen and rejected, or "
        f"{remedy}"
    )


def check_confidences(pairs: Pairs, split: DefaultSplit, run: RunConfig) -> None:
    """Raise `DataError` where a loss cannot take a label as unsure as the data has them."""
    if run.loss.label_confidence and "robust" in run.loss.types and pairs.confidences is not None:
        least = int(pairs.confidences.argmin())
        if not pairs.confidences[least] > 0.5:
            raise DataError(
                f"{SECTIONS[split]}: row {pairs.origins[least, 1]} has confidence {pairs.confidences[least]:g}, and "
                "loss.type robust divides by its distance from 0.5: leave out rows of 0.5 or less, or set loss.type to "
                "sigmoid"
            )


def check_pairs(pairs: Pairs, split: DefaultSplit, run: RunConfig, model: PretrainedConfig) -> None:
    """Raise unless every node holds the same pairs and the model can take the longest. Collective."""
    if pairs.report.text:
        say(f"{split} data: {pairs.report.text}")
    digests = gather_objects(pairs.digest)
    if len(set(digests)) > 1:
        having = {digest: [rank for rank, other in enumerate(digests) if other == digest] for digest in digests}
        sides = "; others by ".join(by_host(ranks) for ranks in having.values())
        raise DataError(f"{SECTIONS[split]}: one set of pairs was read by {sides}; give all nodes the same files")
    for column in run.loss.columns:
        if getattr(pairs, f"{column}s") is None:
            needs, example = f"loss.type {' + '.join(run.loss.types)}", "score_difference"
            if column == "confidence":
                needs, example = "loss.label_confidence", "agreement"
            raise DataError(
                f"{SECTIONS[split]}: rows have no {column}, which {needs} needs: name their column for it in columns, "
                f"e.g. {{{column}: {example}}}"
            )
    check_confidences(pairs, split, run)
    longest = int(longest_sequences(pairs.lengths).max())
    limit = longest_allowed(model)
    if limit and longest > limit:
        raise ConfigError(
            f"data.max_length: {run.data.max_length}, but {run.model.path} takes {limit} tokens and the longest pair "
            f"of the {split} data has {longest}; set data.max_length to {limit} or less"
        )
