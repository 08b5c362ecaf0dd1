"""The fixed prompts of a run, read by one rank and the same on all."""

from __future__ import annotations

from transformers import PretrainedConfig

from dsdpo.config.run import RunConfig
from dsdpo.data.files import Row
from dsdpo.data.pairs import Pairs
from dsdpo.data.prompts import Prompt, encode_prompts, read_prompt_rows
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import all_or_none, broadcast_object, rank
from dsdpo.engine.rope import longest_allowed
from dsdpo.errors import ConfigError


def read_prompts(run: RunConfig) -> list[Row]:
    """The rows of evaluation.samples.prompts, none where nothing is asked. Collective. Raises `DataError`."""
    settings = run.evaluation.samples
    rows: list[Row] = []
    with all_or_none():
        if settings is not None and rank() == 0:
            rows = read_prompt_rows(settings.prompts, count=settings.n)
    return broadcast_object(rows)


def fitting_prompts(
    rows: list[Row], run: RunConfig, tokenizer: Tokenizer, training: Pairs, model: PretrainedConfig
) -> tuple[Prompt, ...]:
    """The rows as prompts that leave the model room for an answer.

    Prompts of plain text are messages where most training rows are. Raises `DataError` or `ConfigError`, on all ranks
    alike.
    """
    settings = run.evaluation.samples
    if settings is None:
        return ()
    dialogues = 2 * training.report.notes.get("text_rows", 0) < training.report.kept
    prompts = tuple(encode_prompts(rows, tokenizer, run.data, text_as_chat=dialogues))
    limit, longest = longest_allowed(model), max(prompts, key=lambda prompt: len(prompt.ids))
    if limit and len(longest.ids) + settings.max_new_tokens > limit:
        raise ConfigError(
            f"evaluation.samples.max_new_tokens: {settings.max_new_tokens} behind the {len(longest.ids)} tokens of "
            f"{longest.place}, but {run.model.path} takes {limit} tokens; set it to {limit - len(longest.ids)} or less"
        )
    return prompts
