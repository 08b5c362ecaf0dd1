"""Which models the packed layout is exact for: those that leave all mixing of tokens to the attention we register.

Judged by what transformers says of the model's class and by its source, on the safe side: a model that is not known to
be fit gets the padded layout, and one that seems fit is checked on real pairs before it trains
(engine/self_check.py).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dsdpo.objective.attention import NAMES

# Words in a model's source for tokens that meet outside attention, or by masks or biases of the model's own making.
OTHER_MIXING = {
    "nn.Conv1d": "a convolution over tokens",
    "causal_conv1d": "a convolution over tokens",
    "recurrent": "a recurrent state",
    "linear_attn": "linear attention",
    "alibi": "ALiBi biases",
    "position_bias": "position biases",
    "indexer": "sparse attention",
    "dynamic_mask": "attention masks of its own",
    "create_chunked_causal_mask": "chunked attention",
}
LAYER_TYPES = {"full_attention", "sliding_attention"}


def model_class(config: PretrainedConfig) -> Any:
    """The causal language model of transformers' own for this Hugging Face configuration; None where there is none."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return None if isinstance(kind, tuple) else kind


def packed_refusal(config: PretrainedConfig, attn_implementation: str = "auto") -> str | None:
    """Why a model of this Hugging Face configuration cannot take the packed layout, or None if it can."""
    name = config.model_type
    if attn_implementation not in NAMES:
        known = ", ".join(NAMES)
        return f"model.attn_implementation {attn_implementation} has no packed counterpart (those that have: {known})"
    kind = model_class(config)
    if kind is None:
        return f"{name} is not a causal language model of transformers' own"
    if type(config).sub_configs:
        return f"{name} is made of several models"
    if not kind._supports_attention_backend:
        return f"{name} does not call its attention through transformers' interface"
    return _source_refusal(kind, name) or _settings_refusal(config, kind)


def _source_refusal(kind: type, name: str) -> str | None:
    """What in a model's source speaks against it."""
    module = sys.modules[kind.__module__]
    source = inspect.getsource(module)
    for word, meaning in OTHER_MIXING.items():
        if word in source:
            return f"{name} has {meaning}"
    for part in vars(module).values():
        if not inspect.isclass(part) or part.__module__ != kind.__module__ or "forward" not in vars(part):
            continue
        forward = inspect.getsource(vars(part)["forward"])
        # Once to take them, once to hand them on. Embeddings may ask for a mask too, to count positions.
        if "attention_mask" in forward and "Embedding" not in part.__name__ and forward.count("**kwargs") < 2:
            return f"{name}'s {part.__name__} does not hand keyword arguments on to its attention"
        if "Attention" in part.__name__ and "attention_interface(" not in forward:
            return f"{name}'s {part.__name__} does not call its attention through transformers' interface"
    return None


def _settings_refusal(config: PretrainedConfig, kind: type) -> str | None:
    """What in a model's settings speaks against it."""
    name = config.model_type
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others:
        return f"{name} has layers of type {', '.join(sorted(others))}"
    for flag in ("use_bidirectional_attention", "reorder_and_upcast_attn", "add_cross_attention"):
        if getattr(config, flag, False):
            return f"{name} has {flag} set"
    # A window that only the model's masks know of would be lost with them.
    source = inspect.getsource(sys.modules[kind.__module__])
    if getattr(config, "sliding_window", None) and "sliding_window=" not in source:
        return f"{name} does not tell its attention of its sliding window"
    return None
