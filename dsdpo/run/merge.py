"""An adapter folder and a base model, checked against each other and merged."""

from __future__ import annotations

from pathlib import Path

from dsdpo.atomic import delete, partial_path
from dsdpo.config.lora import LoraConfig
from dsdpo.config.model import ModelConfig
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.engine.adapter_folder import check_adapter_folder
from dsdpo.engine.blank import check_model_fits
from dsdpo.engine.load import DTYPES
from dsdpo.engine.lora import check_adapter_fits
from dsdpo.engine.merge import write_merged
from dsdpo.errors import ConfigError
from dsdpo.run.model_checks import check_model


def merge_folders(adapter: Path, model: ModelConfig, folder: Path, *, memory_bytes: int, shard_bytes: int) -> bool:
    """Write `model` with the adapter merged in to `folder`, whole or not at all; whether it was streamed.

    Raises `ConfigError` for an adapter that is none, or of another model.
    """
    check_adapter_folder(adapter, key="ADAPTER")
    check_model(model, key="BASE")
    with_adapter = model.model_copy(update={"lora": LoraConfig(path=str(adapter))})
    check_adapter_fits(check_model_fits(model, layout="padded", key="BASE"), with_adapter)
    try:
        tokenizer = load_tokenizer(model.model_copy(update={"path": str(adapter)}))
    except ConfigError:  # an adapter without one
        tokenizer = load_tokenizer(model)
    partial = partial_path(folder)
    delete(partial)
    try:
        streamed = write_merged(
            model, adapter, partial, dtype=DTYPES[model.dtype], memory_bytes=memory_bytes, shard_bytes=shard_bytes
        )
        tokenizer.save_pretrained(partial)
        delete(folder)
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written: {error}") from error
    finally:
        delete(partial)
    return streamed
