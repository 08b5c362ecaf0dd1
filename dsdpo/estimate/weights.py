"""A model's parameters in the order in which a pass uses them, without the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from dsdpo.config.quantization import QuantizationConfig
from dsdpo.config.run import ModelConfig
from dsdpo.data.binning import LayoutName
from dsdpo.engine.blank import blank_lm
from dsdpo.engine.load import DTYPES, switch_off_randomness, tile_mlps
from dsdpo.engine.lora import blank_adapter
from dsdpo.engine.quantization import BlankPackedLinear, pack_blank
from dsdpo.estimate.activations import fuse_norms
from dsdpo.objective.logps import ResponseScorer
from dsdpo.objective.output_head import decoder_of


@dataclass(frozen=True)
class Part:
    """A module that has parameters of its own, as a pass meets it."""

    sizes: tuple[int, ...]  # elements of each parameter
    trained: tuple[bool, ...]
    block: int | None  # number of the layer that gradient checkpointing runs again as one, None: of none
    repeats: bool = False  # True where its parameters are those of an earlier part: tied embeddings


@dataclass(frozen=True)
class Weights:
    """All parameters of a model."""

    parts: tuple[Part, ...]  # in the order of a forward pass
    itemsize: int  # bytes of an element; weights in 4 bits count as the elements that they are packed into
    scales: int = 0  # bytes of the scales of weights in 4 bits, which every rank holds whole

    def sizes(self, *, trained: bool | None = None) -> Iterator[int]:
        """Elements of each parameter once: of those that train, of those that do not, or of all."""
        for part in self.parts:
            if not part.repeats:
                yield from (
                    size
                    for size, trains in zip(part.sizes, part.trained, strict=True)
                    if trained is None or trains == trained
                )

    def total(self, *, trained: bool | None = None) -> int:
        """Elements of all of them."""
        return sum(self.sizes(trained=trained))

    def sharded(self, ranks: int, *, trained: bool | None = None) -> int:
        """Elements on each of as many ranks under ZeRO-3, which pads every parameter to a multiple."""
        return sum(-(-size // ranks) for size in self.sizes(trained=trained))


@dataclass(frozen=True, eq=False)
class Blank:
    """A model on the meta device, ready to be rehearsed, and the sizes of its parameters."""

    lm: Any
    weights: Weights
    layout: LayoutName


def blank_model(
    model: ModelConfig, *, layout: LayoutName, trains: bool, second_adapter: bool = False, key: str = "model.path"
) -> Blank:
    """The model as an engine would get it: dtype, adapters and, where it `trains`, gradient checkpointing.

    Reads nothing but its config.json. Raises `ConfigError` for models that dsdpo cannot train.
    """
    quantization = model.quantization
    bits = quantization.model_dump_json() if quantization is not None and quantization.bits == 4 else None
    plain = model.model_copy(update={"quantization": None})  # of a reference it goes without an adapter
    return _blank_model(plain.model_dump_json(), bits, layout, trains, second_adapter, key)


@lru_cache(maxsize=8)
def _blank_model(
    settings: str, bits: str | None, layout: LayoutName, trains: bool, second_adapter: bool, key: str
) -> Blank:
    model = ModelConfig.model_validate_json(settings)
    lm = blank_lm(model, layout=layout, key=key).to(DTYPES[model.dtype])
    if trains and model.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if bits is not None:
        pack_blank(lm, QuantizationConfig.model_validate_json(bits))
    if model.lora is not None:
        lm = blank_adapter(lm, model, second=second_adapter)
    switch_off_randomness(lm)
    if model.use_liger_kernel:
        fuse_norms(lm)
    if model.mlp_tile_tokens is not None:
        tile_mlps(lm, model.mlp_tile_tokens)
    scorer = ResponseScorer(lm)
    if not trains:
        scorer.requires_grad_(False)
    return Blank(scorer.lm, weights_of(scorer.lm), layout)


def weights_of(lm: Any) -> Weights:
    """The parameters of `lm`; the output head comes last, whatever the order in which the model was built."""
    head = lm.get_output_embeddings()
    layers = {id(layer): number for number, layer in enumerate(blocks_of(lm))}
    of_head = {id(module) for module in head.modules()}
    parts: list[tuple[bool, Part]] = []
    seen: set[int] = set()

    def walk(module: nn.Module, block: int | None) -> None:
        block = layers.get(id(module), block)
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if own:
            repeats = all(id(parameter) in seen for parameter in own)
            sizes = tuple(parameter.numel() for parameter in own)
            trained = tuple(parameter.requires_grad for parameter in own)
            parts.append((id(module) in of_head, Part(sizes, trained, block, repeats)))
            seen.update(map(id, own))
        for child in module.children():
            walk(child, block)

    walk(lm, None)
    itemsize = next(iter(lm.parameters())).element_size()
    scales = sum(module.scale_bytes for module in lm.modules() if isinstance(module, BlankPackedLinear))
    return Weights(tuple(part for _, part in sorted(parts, key=lambda entry: entry[0])), itemsize, scales)


def blocks_of(lm: Any) -> list[nn.Module]:
    """The layers of the decoder: the longest list of modules in it."""
    lists = [list(module) for module in decoder_of(lm).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
