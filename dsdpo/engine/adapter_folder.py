"""What can be wrong with an adapter to go on with, found in its folder before a model loads. Imports no peft."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dsdpo.config.lora import ON_THE_HEAD, targets_head
from dsdpo.config.run import RunConfig
from dsdpo.errors import ConfigError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "model.lora.path"

log = logging.getLogger(__name__)


def check_adapter(run: RunConfig, *, trains_biases: bool) -> None:
    """Raise `ConfigError` unless the adapter in `model.lora.path`, if that is set, can be trained further.

    Biases of the base model may be trained with it only where no reference shares them.
    """
    lora = run.model.lora
    if lora is None or lora.path is None:
        return
    folder = Path(lora.path).expanduser()
    settings = check_adapter_folder(folder)
    if targets_head(settings.get("target_modules") or []):
        raise ConfigError(f"{KEY}: {folder} has a LoRA on the output head, which dsdpo does not train: {ON_THE_HEAD}")
    biases = settings.get("bias", "none")
    if biases != "none" and not trains_biases:
        raise ConfigError(
            f"{KEY}: {folder} trains biases of the base model (bias {biases}), which is the reference under "
            "reference.strategy adapter; set reference.strategy to separate"
        )
    base = str(settings.get("base_model_name_or_path") or "")
    if base and Path(base).name != Path(run.model.path).name:
        log.warning("%s: %s was trained on %s and now goes on %s", KEY, folder, base, run.model.path)


def check_adapter_folder(folder: Path, *, key: str = KEY) -> dict[str, Any]:
    """The settings of the LoRA adapter in a folder. Raises `ConfigError`, which names `key`, where there is none."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{key}: no {name} in {folder}; give an adapter folder as peft's save_pretrained writes it (from "
                "the Hub: hf download)"
            )
    settings = read_adapter_config(folder, key=key)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ConfigError(f"{key}: {folder} holds a {kind} adapter; dsdpo trains LoRA adapters")
    return settings


def read_adapter_config(folder: Path, *, key: str = KEY) -> dict[str, Any]:
    """The content of an adapter folder's settings."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {folder / ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{key}: {folder / ADAPTER_CONFIG} holds no settings; give an adapter folder")
    return settings
