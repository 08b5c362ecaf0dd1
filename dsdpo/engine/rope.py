"""Position embeddings whose factors transformers chooses by the longest position of each forward pass.

Policy and reference see the same pair in other batches, and a packed row is as long as its longest pair: the same pair
would get other factors, and so other log-probs, each time. Here the factors are chosen once, by the run's longest pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

FIXED = "fixed"  # a type of which transformers updates nothing


@torch.no_grad()
def fix_rope_factors(lm: nn.Module, longest: int) -> None:
    """Choose the factors of `longrope` and dynamic NTK for sequences of `longest` tokens, and keep them.

    Sources: LongRoPE (arXiv 2402.13753); transformers' `dynamic_rope_update`, which runs once here and then no more.
    """
    if (choice := rope_choice(_text_config(lm), longest)) is None:
        return
    vars(lm)["rope_choice"] = choice  # for the identity of a reference
    modules: list[Any] = [module for module in lm.modules() if hasattr(module, "rope_type")]
    for module in modules:
        kinds = module.rope_type
        if isinstance(kinds, dict):
            changing = [name for name, kind in kinds.items() if _changes(kind)]
            for name in changing:
                _choose(module, longest, layer_type=name)
            module.rope_type = kinds | dict.fromkeys(changing, FIXED)
        elif _changes(str(kinds)):
            _choose(module, longest)
            module.rope_type = FIXED


def rope_choice(config: PretrainedConfig, longest: int) -> str | None:
    """Which factors a run of this longest pair has, where they depend on it; None where they do not."""
    parts = rope_settings(config)
    if any(part["rope_type"] == "longrope" for part in parts):
        original = min(
            int(part.get("original_max_position_embeddings") or config.original_max_position_embeddings)
            for part in parts
            if part["rope_type"] == "longrope"
        )
        return "long" if longest > original else "short"
    if any(_changes(part["rope_type"]) for part in parts):
        limit = int(config.max_position_embeddings)
        return f"dynamic, {longest} tokens" if longest > limit else "dynamic, original"
    return None


def rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The RoPE parameters of a text model's configuration, one for each type of layer."""
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, dict):
        return []
    parts = [settings] if "rope_type" in settings else [part for part in settings.values() if isinstance(part, dict)]
    return [part for part in parts if "rope_type" in part]


def longest_allowed(config: PretrainedConfig) -> int | None:
    """Tokens that a text model takes: its positions, and what scaling of RoPE adds to them."""
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return None
    for part in rope_settings(config):
        factor = float(part.get("factor") or 1.0)
        if part["rope_type"] == "yarn":
            limit = max(limit, int(factor * int(part.get("original_max_position_embeddings") or limit)))
        elif "dynamic" in part["rope_type"]:
            limit = max(limit, int(factor * limit))
    return int(limit)


def _text_config(lm: Any) -> Any:
    return lm.config.get_text_config()


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _choose(module: Any, longest: int, **layer: str) -> None:
    """One pass over the last position, in which transformers chooses."""
    prefix = f"{layer['layer_type']}_" if layer else ""
    device = getattr(module, f"{prefix}inv_freq").device
    module(torch.zeros(1, 1, 1, device=device), torch.tensor([[longest - 1]], device=device), **layer)
