"""Rows of one file or table, one at a time: (place, row), where place is what a person needs to find the row.

A line that is not JSON is yielded as a `BadRow`, so that one odd line costs one row; so is a record of a table with
more or fewer cells than its header. A file that is not what its
name says is a `DataError`. Memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dsdpo.data.dropped_rows import BadRow
from dsdpo.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, ".parquet", ".arrow")

HEAD_ROWS = 20  # a file with this many lines and not one JSON object among them is no JSON Lines file
BATCH_ROWS = 1000
CHUNK_CHARS = 1 << 20

Row = tuple[str, Any]


def has_known_suffix(path: Path) -> bool:
    """Whether the name ends with one of SUFFIXES."""
    return path.name.lower().endswith(SUFFIXES)


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file of any of SUFFIXES. Raises DataError where it cannot be read as such."""
    name = path.name.lower()
    try:
        if name.endswith(JSON_SUFFIXES):
            yield from _json_rows(path)
        elif name.endswith(TABLE_SUFFIXES):
            yield from _table_rows(path)
        elif name.endswith(".parquet"):
            with pq.ParquetFile(path) as parquet:
                yield from table_rows(parquet.iter_batches(BATCH_ROWS), path.name)
        else:
            yield from table_rows(_arrow_batches(path), path.name)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as {_suffix(path)}: {error}. Check that the file is whole.") from error


def table_rows(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[Row]:
    """The rows of arrow batches, without the nulls that arrow puts where a message lacks a field."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{name} row {number}", without_nulls(row)
            number += 1


def without_nulls(value: Any) -> Any:
    """The value with null entries of objects removed at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of an arrow file in either of its two formats (datasets writes the stream one)."""
    with pa.memory_map(str(path)) as source:
        try:
            yield from pa.ipc.open_stream(source)
            return
        except pa.ArrowInvalid as error:
            not_a_stream = error
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            raise not_a_stream from None
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of JSON Lines or of one JSON array, told apart by the first character."""
    with path.open("rb") as raw:
        stream: Any = gzip.open(raw) if path.name.lower().endswith(".gz") else raw  # noqa: SIM115 - closed with raw
        head = stream.peek(4096)[:4096]
        if b"\0" in head:
            raise DataError(f"{path}: not text but binary data. {_suffix(path)} is UTF-8 text with JSON objects.")
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
            head = head[len(codecs.BOM_UTF8) :]
        yield from (_array_rows if head.lstrip().startswith(b"[") else _line_rows)(stream, path)


def _line_rows(stream: IO[bytes], path: Path) -> Iterator[Row]:
    """One row per line that is not blank; the first lines are held back until one of them is a JSON object."""
    head: list[Row] = []
    found = False
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
            value = BadRow("invalid_json", str(error))
        if found:
            yield place, value
            continue
        head.append((place, value))
        found = isinstance(value, dict)
        if found:
            yield from head
            head.clear()
        elif len(head) == HEAD_ROWS:
            break
    if head:
        why = head[0][1].detail if isinstance(head[0][1], BadRow) else f"a JSON {type(head[0][1]).__name__}"
        raise DataError(
            f"{path}: not a JSON Lines file: no JSON object in its first {len(head)} lines ({head[0][0]}: {why}). "
            "Give a file with one JSON object per line, or a JSON array of objects."
        )


def _table_rows(path: Path) -> Iterator[Row]:
    """One row per record of a CSV or TSV file with a header; empty cells are left out."""
    compressed = path.name.lower().endswith(".gz")
    opened: Any = gzip.open if compressed else open
    csv.field_size_limit(sys.maxsize)
    with opened(path, "rt", encoding="utf-8-sig", newline="") as text:
        records = csv.reader(text, delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
        line = 1
        try:
            header = next(records, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}: its header names a column twice: {', '.join(header)}. Rename one.")
            line = records.line_num + 1
            for record in records:
                if record:
                    yield f"{path.name}:{line}", _record(record, header)
                line = records.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: the record that begins in line {line} is not valid {_suffix(path)} ({error}). Check quotes "
                "and encoding (UTF-8)."
            ) from error


def _record(record: list[str], header: list[str]) -> Any:
    """A record as an object, or as a bad row where it has another number of cells than the header."""
    if len(record) != len(header):
        return BadRow("invalid_table", f"{len(record)} cells, and the header has {len(header)}")
    return {name: cell for name, cell in zip(header, record, strict=True) if cell != ""}


def _array_rows(stream: IO[bytes], path: Path) -> Iterator[Row]:
    """The elements of a JSON array, decoded one after the other from a moving buffer."""
    text = io.TextIOWrapper(stream, encoding="utf-8")
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    index = 0
    try:
        buffer = text.read(CHUNK_CHARS).lstrip()
        at = 1
        while True:
            at = cast(re.Match[str], between.match(buffer, at)).end()
            if buffer.startswith("]", at):
                _check_end(buffer[at + 1 :], text, path)
                return
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError:
                more = text.read(CHUNK_CHARS)
                if not more:
                    raise
                buffer, at = buffer[at:] + more, 0
                continue
            yield f"{path.name}[{index}]", value
            index, at = index + 1, end
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: element {index} of its JSON array is not valid JSON ({error}).") from error


def _check_end(rest: str, text: IO[str], path: Path) -> None:
    """Raises DataError where anything but blanks follows a JSON array."""
    while not rest.strip():
        rest = text.read(CHUNK_CHARS)
        if not rest:
            return
    raise DataError(
        f"{path}: more follows its JSON array ({rest.strip()[:40]!r}), which would not be read. Give one array a file, "
        "or one JSON object per line."
    )


def _suffix(path: Path) -> str:
    """The part of the name that states the format."""
    return next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(suffix))
