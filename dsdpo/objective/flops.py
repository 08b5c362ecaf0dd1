"""Floating-point operations that DPO needs: what the formulas ask for, whatever an implementation does beside them.

One multiply-add is 2 operations. A pair counts as prompt + chosen + rejected with the prompt once, and without the last
token of each response, after which nothing is predicted; only causal (query, key) pairs count, and the output head on
response tokens only. Padding, a second copy of the prompt and recomputed activations are an implementation's own cost.
Norms, rotations, softmax and other element-wise work are left out, as is usual.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PretrainedConfig

from dsdpo.objective.types import CausalLM

Window = int | None  # keys that a query sees at most, itself included; None: all before it
ShapeOf = Callable[[nn.Parameter], Sequence[int]]

EXPERTS = re.compile(r"\.experts\.")
ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save)\.(\w+)")


@dataclass(frozen=True)
class Work:
    """What a model has to go through."""

    tokens: float  # through the layers
    attended: Mapping[Window, float]  # (query, key) pairs of one layer, by how far the layer's queries see
    scored: float  # tokens whose probability the output head gives


@dataclass(frozen=True)
class ModelFlops:
    """What a model costs, per token and per attended pair."""

    trunk: float  # elements of the matrices below the head that one token is multiplied with
    trunk_trained: float  # those of them that get a gradient
    head: float  # elements of the output head
    head_trained: float
    attention: Mapping[Window, float]  # heads times head width, summed over the layers that see so far

    def forward(self, work: Work) -> float:
        """Operations of one forward pass."""
        return 2 * self.trunk * work.tokens + self._attention(work) + 2 * self.head * work.scored

    def backward(self, work: Work) -> float:
        """Operations of one backward pass: every input's gradient, and those of the matrices that train."""
        matrices = (
            2 * (self.trunk + self.trunk_trained) * work.tokens + 2 * (self.head + self.head_trained) * work.scored
        )
        return matrices + 2 * self._attention(work)

    def _attention(self, work: Work) -> float:
        return sum(4 * width * work.attended[window] for window, width in self.attention.items())


def model_flops(
    lm: CausalLM, *, adapter: str | None = None, shape_of: ShapeOf = lambda parameter: parameter.shape
) -> ModelFlops:
    """What a causal language model costs, counted off its parameters and configuration.

    Of adapters only the one of that name counts, None: none of them. `shape_of` gives a parameter's whole shape where
    this process holds a part. A token passes the experts that it is routed to, on average as many parameters of each
    layer's experts as that share of them has.
    """
    config = lm.config.get_text_config()
    share = routed_share(config)

    def elements(module: nn.Module) -> tuple[float, float]:
        """Of the matrices in use: all, and those that train. What embeddings look up is not multiplied."""
        total = trained = 0.0
        for prefix, part in module.named_modules():
            for own, parameter in () if isinstance(part, nn.Embedding) else part.named_parameters(recurse=False):
                name, shape = f".{prefix}.{own}", shape_of(parameter)
                if len(shape) > 1 and not own.endswith("bias") and in_use(name, adapter):
                    size = math.prod(shape) * (share if EXPERTS.search(name) else 1.0)
                    total += size
                    trained += size if parameter.requires_grad else 0.0
        return total, trained

    trunk, trunk_trained = elements(lm.get_decoder())
    head, head_trained = elements(lm.get_output_embeddings())
    return ModelFlops(trunk, trunk_trained, head, head_trained, attention_widths(config))


def in_use(name: str, adapter: str | None) -> bool:
    """True if a parameter takes part in a pass with this adapter: the adapter's own, and the base's that stay."""
    if inside := ADAPTER.search(name):
        return inside[2] == adapter
    return adapter is None or ".original_module." not in name


def routed_share(config: PretrainedConfig) -> float:
    """The share of a layer's experts that a token is routed to; 1 without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    return 1.0 if experts is None else getattr(config, "num_experts_per_tok", experts) / experts


def attention_widths(config: PretrainedConfig) -> dict[Window, float]:
    """Heads times head width of all layers, by how far they see; layers of another kind (Mamba, ...) are left out."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    if getattr(config, "qk_nope_head_dim", None):  # latent attention: queries and values differ in width
        width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding" if sliding else "full"] * config.num_hidden_layers
    widths: dict[Window, float] = {}
    for kind in kinds:
        if "full" in kind or kind == "attention":
            window = None
        elif "sliding" in kind:
            window = sliding
        elif "chunked" in kind:
            window = config.attention_chunk_size
        else:
            continue
        widths[window] = widths.get(window, 0.0) + width
    return widths


def pair_work(lengths: np.ndarray, windows: Sequence[Window] = (None,)) -> Work:
    """What groups of these lengths (n, 1 + responses) take, in layers that see so far; a length of 0: no response."""
    prompt, *responses = lengths.astype(np.float64).T
    # Each response without its last token. What all attend to within the prompt is counted once.
    own = [np.where(response > 0, response - 1, 0) for response in responses]
    attended = {}
    for window in windows:
        shared = causal_pairs(prompt, window)
        rests = sum((causal_pairs(prompt + rest, window) - shared).sum() for rest in own)
        attended[window] = float(shared.sum() + rests)
    return Work(float((prompt + sum(own)).sum()), attended, float(lengths[:, 1:].sum()))


def causal_pairs(length: np.ndarray, window: Window) -> np.ndarray:
    """(query, key) pairs of sequences of these lengths, where a query sees itself and what is before it."""
    seen = length if window is None else np.minimum(length, window)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def step_flops(lengths: np.ndarray, policy: ModelFlops, reference: ModelFlops | None) -> float:
    """Operations of one optimizer step on groups of these lengths, as in `pair_work`.

    Forward and backward of the policy, forward of the reference; None: it is not asked while training.
    """
    windows = tuple({*policy.attention, *(reference.attention if reference else ())})
    work = pair_work(lengths, windows)
    return policy.forward(work) + policy.backward(work) + (reference.forward(work) if reference else 0.0)
