"""A checkpoint of a run as a model folder, in one process without an engine, whoever saved it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from dsdpo.atomic import delete, partial_path
from dsdpo.config.lora import LoraConfig
from dsdpo.config.model import ModelConfig
from dsdpo.config.run import RunConfig
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.engine.blank import blank_lm
from dsdpo.engine.checkpoint_weights import CheckpointWeights
from dsdpo.engine.load import DTYPES
from dsdpo.engine.lora import add_adapter, trained_names, with_settings_of, write_adapter
from dsdpo.engine.merge import write_merged, write_settings
from dsdpo.engine.streamed import MEMORY_BYTES, SHARD_BYTES, Streamed, write_streamed
from dsdpo.errors import CheckpointError
from dsdpo.run.finished import FinishedRun
from dsdpo.run.saved import evaluation_at
from dsdpo.training.checkpoint import find_damage, read_state
from dsdpo.training.export import CARD
from dsdpo.training.model_card import model_card


def export_checkpoint(
    run: FinishedRun,
    checkpoint: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    merge: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the policy of a checkpoint to `folder`, whole or not at all: weights, settings, tokenizer and model card.

    Of an adapter, that is the adapter, or with `merge` the base model with it merged in. `dtype`: null is
    `model.dtype`, to which the float32 weights of the optimizer are rounded as in training. Of a whole model no more
    than `memory_bytes` is held at a time. Raises `CheckpointError` or `ConfigError`.
    """
    if wrong := find_damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged: {wrong}; name another with --checkpoint")
    settings, kind = run.run, DTYPES[dtype or run.run.model.dtype]
    weights = CheckpointWeights(checkpoint)
    tokenizer = load_tokenizer(settings.model)
    partial = partial_path(folder)
    delete(partial)
    try:
        partial.mkdir(parents=True)
        library = "transformers"
        if settings.model.lora is None:
            _export_whole(settings, weights, checkpoint, partial, kind, memory_bytes, shard_bytes)
        elif merge:
            with tempfile.TemporaryDirectory(dir=partial.parent, prefix=".adapter-") as adapter:
                _export_adapter(settings, weights, checkpoint, Path(adapter), kind)
                write_merged(
                    settings.model, Path(adapter), partial, dtype=kind, memory_bytes=memory_bytes,
                    shard_bytes=shard_bytes,
                )  # fmt: skip
        else:
            library = "peft"
            _export_adapter(settings, weights, checkpoint, partial, kind)
        tokenizer.save_pretrained(partial)
        card = model_card(
            settings,
            evaluation_at(checkpoint),
            library=library,
            identity=run.identity,
            step=read_state(checkpoint)["step"],
        )
        (partial / CARD).write_text(card, encoding="utf-8")
        delete(folder)
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"--out: {folder} cannot be written: {error}") from error
    finally:
        delete(partial)


def _export_whole(
    run: RunConfig,
    weights: CheckpointWeights,
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype,
    memory_bytes: int,
    shard_bytes: int,
) -> None:
    lm = blank_lm(run.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in lm.named_parameters()}
    weights.check_fills(shapes, path=checkpoint)
    tensors = [Streamed(name, shape, dtype, _reader(weights, name)) for name, shape in shapes.items()]
    for name, buffer in weights.buffers.items():
        tensors.append(Streamed(name, tuple(buffer.shape), buffer.dtype, _slices(buffer)))
    tensors = list(_as_in_files(lm, tensors))
    write_streamed(folder, tensors, memory_bytes=memory_bytes, shard_bytes=shard_bytes)
    write_settings(run.model, folder, dtype=dtype)


def _export_adapter(
    run: RunConfig, weights: CheckpointWeights, checkpoint: Path, folder: Path, dtype: torch.dtype
) -> None:
    """Write the adapter in peft's files; it is small and held whole."""
    model = run.model
    assert model.lora is not None
    with torch.device("meta"):
        lm = blank_lm(model)
        wrapped = add_adapter(lm, model, seed=0) if model.lora.path is None else with_settings_of(lm, model)
    if model.lora.path is not None:
        _train_adapter(wrapped)
        base = Path(model.path).expanduser()
        wrapped.peft_config["default"].base_model_name_or_path = str(base.resolve()) if base.is_dir() else model.path
    names = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    weights.check_fills(
        {name: tuple(parameter.shape) for name, parameter in wrapped.named_parameters() if name in names},
        path=checkpoint,
    )
    state = {name: weights.whole(name).to(dtype) for name in names}
    twice = {id(parameter): state[name] for name, parameter in wrapped.named_parameters() if name in names}
    every = dict(wrapped.named_parameters(remove_duplicate=False))
    write_adapter(wrapped, {name: twice[id(every[name])] for name in trained_names(wrapped)}, folder)


def _train_adapter(wrapped: Any) -> None:
    """Mark what an adapter that training goes on with trains, as peft does for `is_trainable`."""
    wrapped.peft_config["default"].inference_mode = False
    wrapped.base_model.set_adapter("default", inference_mode=False)


def _reader(weights: CheckpointWeights, name: str) -> Callable[[int, int], Tensor]:
    return lambda first, count: weights.read(name, first, count)


def _slices(tensor: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, count: tensor.reshape(-1)[first : first + count]


def _as_in_files(lm: Any, tensors: Sequence[Streamed]) -> Iterator[Streamed]:
    """The tensors under the names and in the shapes that the model's files have.

    transformers joins some weights as it loads them, such as those of experts. These are taken apart again by its own
    rules, layer by layer: each part of a layer then holds the layer in memory while it is written.
    """
    layers: dict[str, list[Streamed]] = {}
    for tensor in tensors:
        layers.setdefault(_layer(tensor.name), []).append(tensor)
    for own in layers.values():
        blank = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in own}
        found = revert_weight_conversion(lm, dict(blank))
        if {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in blank.items()}:
            yield from own
            continue
        parts = _TakenApart(lm, own)
        for name, value in found.items():
            yield Streamed(name, tuple(value.shape), value.dtype, parts.reader(name))


class _TakenApart:
    """A layer's tensors in their files' form, made when the first of them is read and kept until the last one is."""

    def __init__(self, lm: Any, tensors: Sequence[Streamed]) -> None:
        self._lm, self._tensors = lm, tensors
        self._found: dict[str, Tensor] = {}

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """Of one of them."""

        def read(first: int, count: int) -> Tensor:
            if name not in self._found:
                whole = {
                    t.name: t.read(0, torch.Size(t.shape).numel()).view(t.shape).to(t.dtype) for t in self._tensors
                }
                self._found = dict(revert_weight_conversion(self._lm, whole))
            values = self._found[name]
            piece = values.reshape(-1)[first : first + count]
            if first + count == values.numel():
                del self._found[name]
                piece = piece.clone()
            return piece

        return read


def _layer(name: str) -> str:
    """The part of a parameter's name up to the number of its layer; all outside of layers go alone."""
    parts = name.split(".")
    numbered = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return name if numbered is None else ".".join(parts[: numbered + 1])


def model_of(run: RunConfig, folder: Path) -> ModelConfig:
    """The run's model with the weights that `export_checkpoint` wrote to `folder`."""
    if run.model.lora is None:
        return run.model.model_copy(update={"path": str(folder), "revision": None})
    return run.model.model_copy(update={"lora": LoraConfig(path=str(folder))})
