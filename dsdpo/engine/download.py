"""A model's files on every node before any rank opens them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub.constants import is_offline_mode

from dsdpo.config.model import ModelConfig
from dsdpo.distributed import local_rank, on_some_ranks


def fetch_model(model: ModelConfig) -> None:
    """Download a Hub model once per node, while other ranks wait without a time limit. Collective.

    Loading under ZeRO-3 is one collective after another: a node whose cache lacks the weights would hold up the others
    in the first of them for as long as it downloads.
    """
    if not Path(model.path).exists() and not is_offline_mode():
        on_some_ranks(local_rank() == 0, partial(local_folder, model))


def local_folder(model: ModelConfig) -> Path:
    """The folder of a model's files on this machine; a Hub model's are downloaded unless they are there."""
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    patterns += ["*.bin"] if model.allow_pickle else []
    patterns += ["*.py"] if model.trust_remote_code else []
    found = huggingface_hub.snapshot_download(
        model.path,
        revision=model.revision,
        allow_patterns=patterns,
        ignore_patterns=["*/*"],  # other formats and older weights stand in folders of their own
    )
    return Path(found)
