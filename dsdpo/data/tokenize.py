"""Sources to token pairs, prepared once under a key that covers all they depend on, then only opened.

The key covers the sources (path, size and modification time of every file, or the Hub revision), all their settings,
the tokenizer, its chat template, every setting of `data` that can change what is made, and VERSION. How text becomes
ids is said in `encode`, which rows are understood in `examples`, how many processes work on it in `chunks`; without bad
rows, weights and several sources, pair i is row i of the file.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from dsdpo.atomic import digest_of, publish
from dsdpo.config.data import DataConfig, SourceConfig
from dsdpo.console import counted
from dsdpo.data.binning import sequence_tokens
from dsdpo.data.chunks import Chunk, make_chunks
from dsdpo.data.dropped_rows import DropReport, check_report, collect_problems
from dsdpo.data.encode import Encoder, encoder_for
from dsdpo.data.pairs import Pairs, SourceFacts, damage, open_pairs, write_index, write_tokens
from dsdpo.data.sources import SECTIONS, DefaultSplit, Source, find_sources, read_rows, uses_of_rows
from dsdpo.data.types import Tokenizer
from dsdpo.errors import DataError

__all__ = ["Pairs", "cache_folder", "open_pairs", "prepare_pairs", "template_digest", "tokenizer_digest"]

log = logging.getLogger(__name__)

VERSION = 5  # of the code that decides ids and order: raise it when they change for the same input
# Settings of `data` that change nothing in the prepared pairs; all others are in their key.
WITHOUT_EFFECT = {
    "train", "eval", "shuffle", "layout", "strict", "max_dropped_share", "dataset_num_proc", "cache_dir",
}  # fmt: skip
KEPT_DAYS = 7  # that the chunks of an unfinished preparation stay


def prepare_pairs(
    sources: Sequence[SourceConfig], tokenizer: Tokenizer, *, data: DataConfig, seed: int, default_split: DefaultSplit
) -> Path:
    """The folder with the sources' token pairs, made now unless it is there; safe to call from several processes.

    Pairs on disk that are not what was written are made again, with a warning. What a preparation that was killed had
    finished is used. `default_split` is read where a source with splits names none; `seed` draws the fractional part of
    weights. Raises DataError for data that cannot be used: missing, unreadable, or more bad rows than `data` allows.
    """
    found = find_sources(sources, default_split, data)
    encoder = encoder_for(tokenizer, data)
    key = SECTIONS[default_split]
    folder = cache_folder(data) / f"pairs-{_key(found, encoder, data, seed)}"
    wrong = damage(folder) if folder.is_dir() else None
    if wrong:
        log.warning("%s: the prepared pairs are made again", wrong)
        _discard(folder)
    if not folder.is_dir():
        _check_writable(folder.parent)
        chunks = folder.with_name(f".{folder.name}-{encoder.date_used or 'undated'}")
        try:
            with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent, ignore_cleanup_errors=True) as made:
                _make(Path(made) / "pairs", chunks, found, encoder, data=data, seed=seed, key=key)
                publish(Path(made) / "pairs", folder)
        except DataError:
            shutil.rmtree(chunks, ignore_errors=True)  # the next attempt would find the same
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise DataError(f"data.cache_dir: {folder.parent} cannot be written ({error}). Make room.") from error
            if not folder.is_dir():  # else another process was first, and has cleaned up
                raise
        shutil.rmtree(chunks, ignore_errors=True)
        _discard_old(folder)
    check_report(open_pairs(folder).report, key=key, strict=data.strict, max_dropped_share=data.max_dropped_share)
    return folder


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hash over everything that decides a text's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        # Padding and truncation are left over from earlier calls and decide nothing here.
        rules = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")
        }
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return digest_of([type(tokenizer).__name__, rules, special])


def template_digest(tokenizer: Tokenizer) -> str:
    """Hash over the chat template, or over its absence."""
    return digest_of(tokenizer.chat_template)


def _key(sources: Sequence[Source], encoder: Encoder, data: DataConfig, seed: int) -> str:
    """Hash over everything that prepared pairs depend on."""
    parts = [
        [source.fingerprint, source.split, source.config.model_dump(mode="json", exclude={"path", "set"})]
        for source in sources
    ]
    sampled = any(source.config.weight % 1 for source in sources)
    settings = data.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    tokenizer = encoder.tokenizer
    rules = [tokenizer_digest(tokenizer), template_digest(tokenizer), encoder.end_tokens, settings]
    return digest_of([VERSION, parts, rules, seed if sampled else None])[:32]


def cache_folder(data: DataConfig) -> Path:
    """Where prepared pairs are kept."""
    return Path(data.cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "dsdpo"


def _check_writable(folder: Path) -> None:
    """Raises DataError unless prepared pairs can be written to `folder`, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"data.cache_dir: {folder} cannot be written ({error}). Give a folder that can.") from error


def _make(
    folder: Path, chunks: Path, sources: list[Source], encoder: Encoder, *, data: DataConfig, seed: int, key: str
) -> None:
    """Reads, tokenizes and writes `folder`, by way of the files in `chunks`. Raises DataError if no row is left."""
    chunks.mkdir(exist_ok=True)
    used = {
        index: _uses(source, index, sum(1 for _ in read_rows(source)), seed) > 0
        for index, source in enumerate(sources)
        if source.config.weight < 1
    }
    if len(used) == len(sources) and not any(rows.any() for rows in used.values()):
        raise DataError(
            f"{key}: the weights leave none of {counted(sum(map(len, used.values())), 'row')}. Raise weight."
        )
    paths, progress = make_chunks(
        chunks, sources, encoder, used=used, processes=data.dataset_num_proc or usable_cores(), label=f"prepare {key}"
    )
    folder.mkdir()
    index: list[Chunk] = []
    write_tokens(folder, _tokens(paths, index))
    report = replace(_report(index, sources), date=encoder.date_used)
    check_report(report, key=key, strict=False, max_dropped_share=1.0)
    _check_kinds(index, key)
    uses = [_uses(source, number, progress.rows[number], seed) for number, source in enumerate(sources)]
    _write_index(folder, index, sources, uses, report)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _uses(source: Source, index: int, rows: int, seed: int) -> np.ndarray:
    return uses_of_rows(rows, weight=source.config.weight, seed=seed, index=index)


def _tokens(paths: Iterable[Path], index: list[Chunk]) -> Iterator[np.ndarray]:
    """The chunks' tokens; what else they hold is added to `index`, its ranges counted from the first token of all."""
    before = 0
    for path in paths:
        chunk = Chunk.load(path)
        yield chunk.tokens
        index.append(replace(chunk, tokens=chunk.tokens[:0], unlearned=chunk.unlearned + before))
        before += len(chunk.tokens)


def _report(index: Sequence[Chunk], sources: Sequence[Source]) -> DropReport:
    """What became of all rows."""
    kept = sum(len(chunk.rows) for chunk in index)
    bad = [(sources[chunk.source].config.path, kind, place, detail) for chunk in index
           for _, place, kind, detail in chunk.bad]  # fmt: skip
    notes = sum((Counter(chunk.notes) for chunk in index), Counter[str]())
    return DropReport(
        rows=kept + len(bad),
        kept=kept,
        problems=collect_problems(bad),
        truncated=sum(int(chunk.truncated.sum()) for chunk in index),
        notes=dict(notes),
    )


def _check_kinds(index: Sequence[Chunk], key: str) -> None:
    """Raises DataError where pairs, single rated completions and lists stand in one data set."""
    kinds = set()
    for chunk in index:
        rated, single = ~np.isnan(chunk.scores).all(axis=1), (chunk.lengths[:, 2:] == 0).all(axis=1)
        for name, rows in (("pairs", ~rated), ("single rated completions", rated & single),
                           ("lists of completions", rated & ~single)):  # fmt: skip
            kinds |= {name} if rows.any() else set()
    if len(kinds) > 1:
        raise DataError(
            f"{key}: {' and '.join(sorted(kinds))} cannot be trained on together, as their losses differ. Give sources "
            "of one kind."
        )


def _write_index(
    folder: Path, index: Sequence[Chunk], sources: Sequence[Source], uses: Sequence[np.ndarray], report: DropReport
) -> None:
    """Everything beside the tokens: each source's rows as often as they are used, source after source."""
    columns = max(chunk.lengths.shape[1] for chunk in index)
    lengths = np.concatenate([_widened(chunk.lengths, columns, 0) for chunk in index])
    source = np.concatenate([np.full(len(chunk.rows), chunk.source) for chunk in index])
    rows = np.concatenate([chunk.rows for chunk in index])
    times = np.array([uses[of][row] for of, row in zip(source, rows, strict=True)], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))[:-1]])
    order = _pair_order(source, times)
    extras: dict[str, np.ndarray] = {}
    if any(len(chunk.unlearned) for chunk in index):
        extras["unlearned"] = np.concatenate([chunk.unlearned for chunk in index])
    scores = np.concatenate([_widened(chunk.scores, columns - 1, np.nan) for chunk in index])
    if not np.isnan(scores).all():
        extras["scores"] = scores[order]
    for name in DEFAULTS:
        values = np.concatenate([getattr(chunk, name) for chunk in index])
        if not np.isnan(values).all():
            extras[name] = np.where(np.isnan(values), DEFAULTS[name], values)[order]
    write_index(
        folder,
        starts=starts[order],
        lengths=lengths[order],
        origins=np.stack([source, rows], axis=1)[order],
        report=report,
        extras=extras,
        sources=[_facts(number, of, index) for number, of in enumerate(sources)],
    )


def _widened(rows: np.ndarray, columns: int, value: float) -> np.ndarray:
    """The rows with so many columns, filled with `value`."""
    return np.pad(rows, ((0, 0), (0, columns - rows.shape[1])), constant_values=value)


DEFAULTS = {"margins": 0.0, "weights": 1.0, "confidences": 1.0}
"""What a pair has where others of the data have a margin, weight or confidence and it has none."""


def _facts(number: int, source: Source, index: Sequence[Chunk]) -> SourceFacts:
    """What is to be known of one source."""
    own = [chunk for chunk in index if chunk.source == number]
    digests = np.concatenate([np.zeros(0, np.uint64), *(chunk.digests for chunk in own)])
    dropped = Counter(kind for chunk in own for _, _, kind, _ in chunk.bad)
    return SourceFacts(
        path=source.config.path,
        rows=sum(len(chunk.rows) + len(chunk.bad) for chunk in own),
        pairs=len(digests),
        dropped=dict(sorted(dropped.items())),
        truncated=sum(int(chunk.truncated.sum()) for chunk in own),
        tokens=sum(int(sequence_tokens(chunk.lengths).sum()) for chunk in own),
        duplicates=len(digests) - len(np.unique(digests)),
        files=tuple(path.name for path in source.files),
        unread=tuple(path.name for path in source.unread),
    )


def _pair_order(source: np.ndarray, uses: np.ndarray) -> np.ndarray:
    """Row of each pair: source after source, and each source's rows as often as they are used, in file order."""
    passes = [
        np.flatnonzero((source == index) & (uses >= turn))
        for index in np.unique(source)
        for turn in range(1, int(uses[source == index].max()) + 1)
    ]
    return np.concatenate(passes)


def _discard(folder: Path) -> None:
    """Delete a folder of prepared pairs: renamed first, so that nobody opens it half deleted."""
    with tempfile.TemporaryDirectory(prefix=".damaged-", dir=folder.parent, ignore_cleanup_errors=True) as away:
        try:
            os.rename(folder, Path(away) / "pairs")
        except FileNotFoundError:
            return  # another process was first


def _discard_old(folder: Path) -> None:
    """Deletes what preparations that nobody went on with have left beside `folder`, which has just been made."""
    now = folder.stat().st_mtime
    for left in [*folder.parent.glob(".pairs-*"), *folder.parent.glob(".making-*")]:
        with suppress(OSError):
            if now - left.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(left, ignore_errors=True)
