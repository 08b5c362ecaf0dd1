"""An adapter in place of full fine-tuning: the settings of peft's LoRA, or an adapter to go on with."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from dsdpo.config.section import PathText, Section

OUTPUT_HEADS = ("lm_head", "embed_out", "output_layer")
ON_THE_HEAD = (
    "the output head is applied in chunks straight from its weights, which leaves a LoRA on it out; train the head "
    "whole with modules_to_save: [lm_head] instead"
)


class LoraConfig(Section):
    """A LoRA adapter; apart from path, peft.LoraConfig's fields under its names."""

    path: PathText | None = None
    """Adapter folder to go on with, in place of every other field; null: a fresh adapter."""
    r: PositiveInt = 8
    """Rank of the update."""
    lora_alpha: Annotated[int | float, Field(gt=0)] = 8
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs (0 to 1) zeroed in training passes; none in reference and evaluation passes."""
    target_modules: str | list[str] = "all-linear"
    """Modules to adapt: names, a regular expression, or all-linear for every linear layer but the output head."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out: names or a regular expression."""
    use_dora: bool = False
    """Train a magnitude beside the update (DoRA)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    modules_to_save: list[str] | None = None
    """Modules to train whole and store with the adapter, e.g. [embed_tokens, lm_head]."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base model to train too; no other value goes with the base model as reference."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """First weights; true and gaussian start as the base model. Ways that rewrite the base weights are not offered."""
    rank_pattern: dict[str, PositiveInt] = Field(default={})
    """r of single modules, by name or regular expression."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default={})
    """lora_alpha of single modules, by name or regular expression."""
    layers_to_transform: int | list[int] | None = None
    """Indices of the only layers to adapt."""
    layers_pattern: str | list[str] | None = None
    """Name of the module list that those indices count in, where it is not a common one."""

    @model_validator(mode="after")
    def _one_kind(self) -> LoraConfig:
        others = sorted(self.model_fields_set - {"path"})
        if self.path is not None and others:
            raise ValueError(
                f"model.lora.path {self.path} and model.lora.{others[0]} {getattr(self, others[0])!r} both describe "
                "the adapter: a folder brings its own settings; keep one of the two"
            )
        patterns = [("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)]
        patterns += [("rank_pattern", key) for key in self.rank_pattern]
        patterns += [("alpha_pattern", key) for key in self.alpha_pattern]
        for name, pattern in patterns:
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"model.lora.{name} {pattern!r} is no regular expression ({error}): correct it, or give names"
                    ) from None
        if targets_head(self.target_modules):
            raise ValueError(f"model.lora.target_modules {self.target_modules!r}: {ON_THE_HEAD}")
        return self

    @model_serializer(mode="wrap")
    def _path_alone(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What loads again: beside a path no other field may stand."""
        return handler(self) if self.path is None else {"path": self.path}

    def peft_fields(self) -> dict[str, Any]:
        """The arguments of peft.LoraConfig for a fresh adapter."""
        return self.model_dump(exclude={"path"})


def targets_head(target_modules: str | list[str]) -> bool:
    """True if LoRA would be put on the output head."""
    if isinstance(target_modules, str):
        return any(re.fullmatch(target_modules, head) for head in OUTPUT_HEADS)
    return any(name.split(".")[-1] in OUTPUT_HEADS for name in target_modules)
