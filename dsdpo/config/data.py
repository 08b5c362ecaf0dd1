"""Where preference pairs come from and how they become tokens: the data section of a run, without importing torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from dsdpo.config.section import PathText, Section

Column = Literal["prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs", "margin", "weight"]


class SourceConfig(Section):
    """One place that preference pairs come from."""

    path: PathText
    """Local file or folder (JSONL, JSON, Parquet, Arrow) or Hub id."""
    name: str | None = None
    """Hub configuration (subset) of the data set."""
    split: str | None = None
    """Split to read, slices such as train[:1000] included; null: train, and test for data.eval."""
    revision: str | None = None
    """Hub branch, tag or commit of the data set."""
    weight: PositiveFloat = 1.0
    """Times each row is used per epoch; the fractional part is a sample drawn with train.seed."""
    columns: dict[Column, str] | None = None
    """Our column name to the file's, where they differ, e.g. {chosen: preferred, rejected: other}."""


def _as_sources(value: Any) -> Any:
    """A path, one source or a list of either, as a list of sources."""
    entries = value if isinstance(value, list) else [value]
    return value if value is None else [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


Sources = Annotated[list[SourceConfig], Field(min_length=1), BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Preference pairs and how they become tokens."""

    train: Sources
    """Path or Hub id to train on, or a list of {path, name, split, revision, weight, columns}."""
    eval: Annotated[list[SourceConfig] | None, BeforeValidator(_as_sources)] = None
    """Held-out pairs, given like train; null: no evaluation."""
    max_length: PositiveInt = 2048
    """Longest prompt plus one response, in tokens; longer ones are truncated."""
    shuffle: bool = True
    """Draw a new order from train.seed each epoch; false keeps the order of the rows."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """packed: one row without padding, what a pair's responses both begin with once. padded: a row each. auto: packed
    if the models can take it."""
    strict: bool = False
    """Stop at the first bad row instead of dropping bad rows with a warning."""
    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest share of rows (0 to 1) that may be dropped as bad before it is an error."""
    dataset_num_proc: PositiveInt | None = None
    """Processes that tokenize; null: one for each core."""
    cache_dir: str | None = None
    """Folder for prepared data; null: the cache of Hugging Face datasets."""
