"""The MLPs of a model's layers, computed a tile of tokens at a time.

An MLP's inner activations are several times as wide as its input, and of a long row they are the most that a
checkpointed layer holds. Tokens do not meet in an MLP, so tiles are exact; in the backward pass each tile's activations
are made again when its turn comes, and one tile's are alive at a time. Source: ALST's tiled MLP (arXiv 2506.13996).
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsdpo.errors import ConfigError

NAMES = ("mlp", "feed_forward", "ffn", "ff")  # what transformers' layers call their MLP


def mlps_of(lm: Any) -> list[nn.Module]:
    """The MLPs of a model's layers: those that compute every token alike, not mixtures of experts.

    Raises `ConfigError` where a model has none that is known for one.
    """
    found = [module for name, module in lm.named_modules() if name.split(".")[-1] in NAMES and _is_dense(module)]
    if not found:
        raise ConfigError(
            f"model.mlp_tile_tokens: {type(lm).__name__} has no MLP that can be cut into tiles (experts compute their "
            "own tokens only): leave it out"
        )
    return found


def _is_dense(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    return not any("expert" in name for name, _ in module.named_modules()) and len(parameters) == 1


def compute_in_tiles(mlp: nn.Module, tokens: int) -> None:
    """Have an MLP compute `tokens` tokens at a time, with the same results; hooks on it see the whole row."""
    vars(mlp)["forward"] = partial(_in_tiles, mlp.forward, tokens)


def _in_tiles(whole: Any, tokens: int, hidden: Tensor) -> Tensor:
    """(R, T, H) of (R, T, H)."""
    rows, length = hidden.shape[:2]
    size = max(1, tokens // rows)
    if length <= size:
        answer: Tensor = whole(hidden)
        return answer
    tiles = hidden.split(size, dim=1)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(whole, tile, use_reentrant=False) for tile in tiles], dim=1)
    return torch.cat([whole(tile) for tile in tiles], dim=1)
