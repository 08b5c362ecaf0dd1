"""Where preference pairs come from and how they become tokens: the data section of a run, without importing torch."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from dsdpo.config.section import FolderText, PathText, Section

Column = Literal[
    "prompt",
    "chosen",
    "rejected",
    "preferred",
    "system",
    "history",
    "tools",
    "chat_template_kwargs",
    "completion",
    "label",
    "completions",
    "scores",
    "ranks",
    "margin",
    "weight",
    "confidence",
]


# Arguments of apply_chat_template that are not for the template itself, and what it is given in any case.
NOT_OF_TEMPLATES = (
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "fixed_dates"),
)


def _as_list(value: Any) -> Any:
    """One value or a list of them, as a list."""
    return value if isinstance(value, (list, tuple)) else [value]


Values = Annotated[tuple[bool | int | float | str, ...], BeforeValidator(_as_list)]


class PreferredConfig(Section):
    """What the values of the column under columns.preferred mean."""

    chosen: Values
    """Value or values that prefer the response under columns.chosen."""
    rejected: Values
    """Value or values that prefer the response under columns.rejected."""
    tie: Values = ()
    """Value or values that prefer neither; such rows are left out."""


class SourceConfig(Section):
    """One place that preference pairs come from."""

    path: PathText
    """Local file or folder (JSONL, JSON, CSV, TSV, Parquet, Arrow, saved by datasets) or Hub id."""
    name: str | None = None
    """Hub configuration (subset) of the data set."""
    split: str | None = None
    """Split to read, or a slice of it such as train[:1000] or train[95%:]; null: train, and test for data.eval. A file
    is one split, train."""
    revision: str | None = None
    """Hub branch, tag or commit of the data set."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Times each row is used per epoch; the fractional part is a sample drawn with train.seed."""
    set: str | None = None
    """Of data.eval: the held-out set that this source belongs to, whose metrics are given apart."""
    columns: dict[Column, str | None] | None = None
    """Our column name to the file's, where they differ, e.g. {chosen: better, rejected: worse}; dots go into objects
    and lists. preferred: the column that says which of the two is better."""
    preferred_values: PreferredConfig | None = None
    """What columns.preferred holds, e.g. {chosen: 1, rejected: 0}; null: a, b, model_a, tie and the like."""


def _as_sources(value: Any) -> Any:
    """A path, one source or a list of either, as a list of sources."""
    entries = value if isinstance(value, list) else [value]
    if entries in ([None], ["null"]):  # --data.eval null
        return None
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _as_sets(value: Any) -> Any:
    """Sources, or a mapping from the names of held-out sets to each one's sources, as a list of sources."""
    if not isinstance(value, dict) or "path" in value:
        return _as_sources(value)
    found = []
    for name, sources in value.items():
        for entry in _as_sources(sources) or [None]:
            found.append({**entry, "set": str(name)} if isinstance(entry, dict) else entry)
    return found


Sources = Annotated[list[SourceConfig], Field(min_length=1), BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Preference pairs and how they become tokens."""

    train: Sources
    """Path or Hub id to train on, or a list of {path, name, split, revision, weight, columns, preferred_values}."""
    eval: Annotated[list[SourceConfig] | None, BeforeValidator(_as_sets)] = None
    """Held-out pairs, given like train, or {NAME: sources, ...} for several sets whose metrics are given apart; null:
    no evaluation."""
    max_length: PositiveInt = 2048
    """Longest prompt plus one response, in tokens; longer ones are truncated."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt, in tokens, below max_length; longer ones are truncated. null: no limit of its own."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """What stays of what is too long. keep_start: the beginning of prompt and responses; a prompt that fills max_length
    alone makes a bad row. keep_end: the end of the prompt (and its BOS), so that responses stay whole if they can."""
    train_on: Literal["all", "assistant", "last"] = "assistant"
    """What is learned of a response of several messages: all, the assistant's turns, or its last turn."""
    text: Literal["as_is", "chat"] = "as_is"
    """Rows whose fields are all text: as_is, joined without a chat template; chat, put into it as messages."""
    pairing: Literal["best_worst", "adjacent", "all", "list"] = "best_worst"
    """Pairs made of n scored or ranked completions: best and worst, neighbours by score, or all; list: no pairs, all n
    for losses of lists."""
    min_score_gap: NonNegativeFloat = 0.0
    """Smallest difference of two completions' scores that makes a pair; equal ones never do."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Variables for the chat template in every row, e.g. {enable_thinking: false}; a row's own win."""
    add_eos: Literal["auto", "never"] = "auto"
    """auto: add EOS where text has none, and where a chat template ends a response with no special token."""
    keep_thoughts: Literal["drop", "refuse"] = "drop"
    """Thoughts in responses that the chat template cuts on purpose: drop them, or refuse the row."""
    date: str | None = None
    """What a chat template that writes the date is told, YYYY-MM-DD; null: the date of the first preparation."""
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
    cache_dir: FolderText | None = None
    """Folder for prepared data; null: the cache of Hugging Face datasets."""

    @model_validator(mode="after")
    def _leaves_room(self) -> DataConfig:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length {self.max_prompt_length} leaves no room for a response in data.max_length "
                f"{self.max_length}: give less, or leave it out"
            )
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_of_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := next((name for name in value if name in NOT_OF_TEMPLATES), None):
            raise ValueError(
                f"data.chat_template_kwargs: {taken} is no variable of a template but an argument of transformers' "
                "apply_chat_template, which dsdpo gives: leave it out"
            )
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _is_date(cls, value: Any) -> Any:
        try:
            return value if value is None else date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError(f"data.date is {value!r}: give a date as YYYY-MM-DD, or leave it out") from None

    @model_validator(mode="after")
    def _sets_are_held_out(self) -> DataConfig:
        named = next((source for source in self.train if source.set is not None), None)
        if named is not None:
            raise ValueError(f"data.train: set {named.set} ({named.path}) has effect in data.eval only: leave it out")
        for name in sorted({source.set for source in self.eval or () if source.set is not None}):
            if name in ("source", "length") or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"data.eval: {name!r} is no name for a held-out set: give one of letters, digits, ., _ and -, "
                    "other than source and length, with which metrics by source and by length begin"
                )
        return self
