"""What is used of a causal language model of transformers, with or without peft's wrapper around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn


class CausalLM(Protocol):
    """A decoder from token ids to hidden states and a linear output head: `transformers.PreTrainedModel`."""

    config: Any

    @property
    def base_model(self) -> nn.Module:
        """The model below the head."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """What a forward pass gives; `.logits` are (B, T, V)."""
        ...

    def get_input_embeddings(self) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def get_decoder(self) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def children(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
