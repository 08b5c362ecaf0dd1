"""Sources to token pairs, prepared once under a key that covers all they depend on, then only opened.

The key covers the sources (path, size and modification time of every file, or the Hub revision), their columns and
weights, the tokenizer, its chat template, `data.max_length`, and VERSION. How text becomes ids is said in `encode`,
which rows are understood in `examples`; without bad rows, weights and several sources, pair i is row i of the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dsdpo.config.data import DataConfig, SourceConfig
from dsdpo.data.dropped_rows import BadRow, DropReport, check_report, collect_problems
from dsdpo.data.encode import Encoded, Encoder, encode_examples, make_encoder
from dsdpo.data.examples import to_example
from dsdpo.data.pairs import Pairs, damage, open_pairs, write_index, write_tokens
from dsdpo.data.sources import SECTIONS, DefaultSplit, Source, find_sources, read_rows, uses_of_rows
from dsdpo.errors import DataError

__all__ = ["Pairs", "cache_folder", "open_pairs", "prepare_pairs", "template_digest", "tokenizer_digest"]

log = logging.getLogger(__name__)

VERSION = 1  # of the code that decides ids and order: raise it when they change for the same input
BATCH_ROWS = 1000

EXAMPLE_COLUMNS = pa.schema(
    {
        "source": pa.int32(),  # index into the sources
        "row": pa.int64(),  # in its source, counted from 0
        "place": pa.string(),  # where a person finds the row
        "kind": pa.string(),  # of bad row; empty for a good one
        "detail": pa.string(),  # of bad row
        "example": pa.string(),  # JSON: forms and fields differ between rows, which no arrow type follows
    }
)
PAIR_COLUMNS = datasets.Features(
    {
        "source": datasets.Value("int32"),
        "row": datasets.Value("int64"),
        "place": datasets.Value("string"),
        "kind": datasets.Value("string"),
        "detail": datasets.Value("string"),
        "tokens": datasets.List(datasets.Value("int32")),  # prompt, chosen, rejected; empty for a bad row
        "lengths": datasets.List(datasets.Value("int32"), length=3),
        "truncated": datasets.Value("bool"),
        "rewritten": datasets.Value("bool"),
    }
)


@dataclass(frozen=True)
class Examples:
    """Every row that was read, as an example or as a bad row."""

    rows: datasets.Dataset  # EXAMPLE_COLUMNS, memory-mapped
    uses: np.ndarray  # (len(rows),) int32, times per epoch


def prepare_pairs(
    sources: Sequence[SourceConfig], tokenizer: Any, *, data: DataConfig, seed: int, default_split: DefaultSplit
) -> Path:
    """The folder with the sources' token pairs, made now unless it is there; safe to call from several processes.

    Pairs on disk that are not what was written are made again, with a warning.
    `default_split` is read where a source with splits names none; `seed` draws the fractional part of weights.
    Raises DataError for data that cannot be used: missing, unreadable, or more bad rows than `data` allows.
    """
    found = find_sources(sources, default_split)
    folder = cache_folder(data) / f"pairs-{_key(found, tokenizer, data.max_length, seed)}"
    wrong = damage(folder) if folder.is_dir() else None
    if wrong:
        log.warning("%s: the prepared pairs are made again", wrong)
        _discard(folder)
    if not folder.is_dir():
        _check_writable(folder.parent)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent, ignore_cleanup_errors=True) as made:
            _make(Path(made), found, tokenizer, data=data, seed=seed, key=SECTIONS[default_split])
            _publish(Path(made) / "pairs", folder)
    check_report(
        open_pairs(folder).report,
        key=SECTIONS[default_split],
        strict=data.strict,
        max_dropped_share=data.max_dropped_share,
    )
    return folder


def load_examples(sources: Sequence[Source], folder: Path, *, seed: int, chat_template: bool) -> Examples:
    """The sources' rows in order, written to `folder`; their memory does not grow with the data.

    Raises DataError for an unreadable source, and for messages where there is no `chat_template` to render them.
    """
    path = folder / "examples.arrow"
    counts = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, EXAMPLE_COLUMNS) as writer:
        for index, source in enumerate(sources):
            count = 0
            for batch in _batches(_example_rows(source, index, chat_template=chat_template)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=EXAMPLE_COLUMNS))
                count += len(batch)
            counts.append(count)
    uses = [
        uses_of_rows(count, weight=source.config.weight, seed=seed, index=index)
        for index, (count, source) in enumerate(zip(counts, sources, strict=True))
    ]
    return Examples(datasets.Dataset.from_file(str(path)), np.concatenate(uses))


def tokenizer_digest(tokenizer: Any) -> str:
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
    return _digest([type(tokenizer).__name__, rules, special])


def template_digest(tokenizer: Any) -> str:
    """Hash over the chat template, or over its absence."""
    return _digest(tokenizer.chat_template)


def _key(sources: Sequence[Source], tokenizer: Any, max_length: int, seed: int) -> str:
    """Hash over everything that prepared pairs depend on."""
    parts = [[source.fingerprint, source.split, source.columns, source.config.weight] for source in sources]
    sampled = any(source.config.weight % 1 for source in sources)
    rules = [tokenizer_digest(tokenizer), template_digest(tokenizer), max_length]
    return _digest([VERSION, parts, rules, seed if sampled else None])[:32]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def _make(folder: Path, sources: list[Source], tokenizer: Any, *, data: DataConfig, seed: int, key: str) -> None:
    """Reads, tokenizes and writes `folder`/pairs. Raises DataError if no row is left."""
    has_template = tokenizer.chat_template is not None
    examples = load_examples(sources, folder, seed=seed, chat_template=has_template)
    used = np.flatnonzero(examples.uses)
    if not len(used):
        raise DataError(f"{key}: the weights leave none of {len(examples.uses)} rows. Raise weight.")
    rows = examples.rows if len(used) == len(examples.rows) else examples.rows.select(used)
    encoder = make_encoder(tokenizer, max_length=data.max_length)
    tokenized = rows.map(
        _tokenize_batch,
        batched=True,
        batch_size=BATCH_ROWS,
        fn_kwargs={"encoder": encoder},
        num_proc=data.dataset_num_proc,
        remove_columns=["example"],
        features=PAIR_COLUMNS,
        cache_file_name=str(folder / "tokenized.arrow"),
        load_from_cache_file=False,
        new_fingerprint="dsdpo",  # computing one would hash the tokenizer; the folder's name is the real key
        desc="tokenize",
    )
    pairs = folder / "pairs"
    pairs.mkdir()
    table = tokenized.with_format("arrow")
    write_tokens(pairs, (_flat(part["tokens"]) for part in table.iter(BATCH_ROWS)))
    facts = table.remove_columns(["tokens", "place", "detail"])[:]
    good = np.asarray(facts["kind"].to_numpy()) == ""
    lengths = _flat(facts["lengths"]).reshape(-1, 3)
    source = facts["source"].to_numpy()
    report = DropReport(
        rows=len(good),
        kept=int(good.sum()),
        problems=collect_problems(_bad_rows(table.select(np.flatnonzero(~good)), sources)),
        truncated=int(facts["truncated"].to_numpy().sum()),
        rewritten=int(facts["rewritten"].to_numpy().sum()),
    )
    check_report(report, key=key, strict=False, max_dropped_share=1.0)
    starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))[:-1]])
    order = _pair_order(source, np.where(good, examples.uses[used], 0))
    origins = np.stack([source, facts["row"].to_numpy()], axis=1)
    write_index(pairs, starts=starts[order], lengths=lengths[order], origins=origins[order], report=report)


def _pair_order(source: np.ndarray, uses: np.ndarray) -> np.ndarray:
    """Row of each pair: source after source, and each source's rows as often as they are used, in file order."""
    passes = [
        np.flatnonzero((source == index) & (uses >= turn))
        for index in np.unique(source)
        for turn in range(1, int(uses[source == index].max()) + 1)
    ]
    return np.concatenate(passes)


def _example_rows(source: Source, index: int, *, chat_template: bool) -> Iterator[dict[str, Any]]:
    """One source's rows in EXAMPLE_COLUMNS."""
    rows = tqdm(read_rows(source), desc=f"read {source.config.path}", unit=" rows", leave=False, disable=None)
    for number, (place, row) in enumerate(rows):
        kind = detail = example = ""
        try:
            fields = to_example(row, source.columns)
            example = _as_json(fields)
            if not chat_template and isinstance(fields["prompt"], list):
                raise DataError(
                    f"{source.key}: {place} holds messages, but the tokenizer has no chat template. Give one with "
                    "model.chat_template, use a tokenizer that has one, or give rows whose fields are text."
                )
        except BadRow as bad:
            kind, detail = bad.kind, bad.detail
        yield {"source": index, "row": number, "place": place, "kind": kind, "detail": detail, "example": example}


def _as_json(fields: dict[str, Any]) -> str:
    """The fields as JSON text. Raises BadRow where they hold half a surrogate pair, which no tokenizer takes."""
    text = json.dumps(fields, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("wrong_type", f"not valid Unicode: {error.reason}") from error
    return text


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows in lists of BATCH_ROWS."""
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenize_batch(batch: dict[str, list[Any]], *, encoder: Encoder) -> dict[str, list[Any]]:
    """A batch of EXAMPLE_COLUMNS in PAIR_COLUMNS."""
    good = [index for index, kind in enumerate(batch["kind"]) if not kind]
    results = encode_examples([json.loads(batch["example"][index]) for index in good], encoder)
    encoded: dict[int, Encoded] = {}
    kinds, details = list(batch["kind"]), list(batch["detail"])
    for index, result in zip(good, results, strict=True):
        if isinstance(result, BadRow):
            kinds[index], details[index] = result.kind, result.detail
        else:
            encoded[index] = result
    empty = Encoded([], [], [], truncated=False, rewritten=False)
    pairs = [encoded.get(index, empty) for index in range(len(kinds))]
    return {
        "kind": kinds,
        "detail": details,
        "tokens": [pair.prompt + pair.chosen + pair.rejected for pair in pairs],
        "lengths": [[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs],
        "truncated": [pair.truncated for pair in pairs],
        "rewritten": [pair.rewritten for pair in pairs],
    }


def _bad_rows(table: datasets.Dataset, sources: list[Source]) -> Iterator[tuple[str, str, str, str]]:
    """(source, kind, place, detail) of the rows of a table of bad rows."""
    for row in table.with_format(None):
        yield sources[row["source"]].config.path, row["kind"], row["place"], row["detail"]


def _flat(lists: pa.ChunkedArray) -> np.ndarray:
    """All numbers of a column of lists, one after the other."""
    return np.asarray(lists.combine_chunks().flatten().to_numpy(zero_copy_only=False), dtype=np.int32)


def _discard(folder: Path) -> None:
    """Deletes a folder of prepared pairs, which is out of the way at once."""
    with tempfile.TemporaryDirectory(prefix=".damaged-", dir=folder.parent, ignore_cleanup_errors=True) as away:
        try:
            os.rename(folder, Path(away) / "pairs")
        except FileNotFoundError:
            return  # another process was first


def _publish(made: Path, folder: Path) -> None:
    """Moves a finished folder to its place in one step; where another process was first, its work stands."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(made)
