"""The trained policy as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsdpo.config.run import RunConfig
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import on_some_ranks, rank
from dsdpo.engine.load import DTYPES
from dsdpo.engine.lora import save_adapter
from dsdpo.engine.merge import write_merged
from dsdpo.engine.shards import whole_state_dict
from dsdpo.engine.types import TrainingEngine
from dsdpo.training.model_card import model_card

CARD = "README.md"


def export_model(
    policy: TrainingEngine,
    tokenizer: Tokenizer,
    run: RunConfig,
    folder: Path,
    *,
    metrics: dict[str, float],
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Write whole weights (safetensors, in the engine's dtype), tokenizer and model card to `folder`. Collective.

    Of a policy with an adapter, that is the adapter alone; see `export_adapter`. Works from any ZeRO stage: parameters
    are gathered in bounded groups and only rank 0 keeps them, on the CPU. `metrics` and the reference's `identity` go
    into the card.
    """
    lm = policy.module.lm
    if run.model.lora is not None:
        export_adapter(lm, tokenizer, run, folder, metrics=metrics, identity=identity)
        return
    state = whole_state_dict(lm, keep=rank() == 0)

    def write() -> None:
        lm.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(model_card(run, metrics, identity=identity), encoding="utf-8")

    on_some_ranks(rank() == 0, write)  # hundreds of gigabytes take longer than a collective may


def export_adapter(
    lm: Any,
    tokenizer: Tokenizer,
    run: RunConfig,
    folder: Path,
    *,
    metrics: dict[str, float],
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter to `folder`, and if asked for, the merged model to `merged` beside it. Collective.

    Merging reads the base model anew, on rank 0: see `write_merged`.
    """
    save_adapter(lm, folder)

    def write() -> None:
        tokenizer.save_pretrained(folder)
        card = model_card(run, metrics, library="peft", identity=identity)
        (folder / CARD).write_text(card, encoding="utf-8")
        if run.export.merge_adapter:
            merged = folder.parent / "merged"
            write_merged(run.model, folder, merged, dtype=DTYPES[run.model.dtype])
            tokenizer.save_pretrained(merged)
            (merged / CARD).write_text(model_card(run, metrics, identity=identity), encoding="utf-8")

    on_some_ranks(rank() == 0, write)
