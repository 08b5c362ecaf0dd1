"""A model's files on every node before any rank opens them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub.constants import is_offline_mode

from dsdpo.config.run import ModelConfig
from dsdpo.distributed import local_rank, on_some_ranks


def fetch_model(model: ModelConfig) -> None:
    """Download a Hub model once per node, while other ranks wait without a time limit. Collective.

    Loading under ZeRO-3 is one collective after another: a node whose cache lacks the weights would hold up the others
    in the first of them for as long as it downloads.
    """
    if Path(model.path).exists() or is_offline_mode():
        return
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    patterns += ["*.bin"] if model.allow_pickle else []
    patterns += ["*.py"] if model.trust_remote_code else []
    download = partial(
        huggingface_hub.snapshot_download,
        model.path,
        revision=model.revision,
        allow_patterns=patterns,
        ignore_patterns=["*/*"],  # other formats and older weights stand in folders of their own
    )
    on_some_ranks(local_rank() == 0, download)
