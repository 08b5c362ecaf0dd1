"""Models looked at before any weights load: is the folder a model, and one that dsdpo can train?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from dsdpo.config.run import ModelConfig
from dsdpo.errors import ConfigError


def check_model(model: ModelConfig, *, key: str) -> Any:
    """The model's configuration. Raises `ConfigError` if there is no such model, or no weights beside it."""
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{key}: {folder} has no config.json; give a Hugging Face model folder or Hub id")
        pickled = any(folder.glob("pytorch_model*.bin"))
        if not any(folder.glob("*.safetensors")) and not (pickled and model.allow_pickle):
            if not pickled:
                raise ConfigError(f"{key}: {folder} has no weights (*.safetensors); give the folder of a whole model")
            raise ConfigError(
                f"{key}: {folder} has its weights only as pytorch_model.bin, a pickle, which can run code when it is "
                "read; save the model again as safetensors (save_pretrained of transformers does), or set "
                "model.allow_pickle to true if you trust where it came from"
            )
    elif folder.is_file() or model.path.startswith((".", "/", "~")):
        raise ConfigError(f"{key}: no folder {folder}; give a Hugging Face model folder or Hub id")
    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # whatever the Hub client or a parser raises
        first_line = str(error).strip().splitlines()[0]
        what = "" if folder.is_dir() else " is no folder here and"
        raise ConfigError(f"{key}: {model.path!r}{what} cannot be loaded: {first_line}") from error
    return config
