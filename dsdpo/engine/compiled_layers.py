"""Decoder layers compiled by torch (`model.torch_compile`), with ZeRO's hooks outside of what is compiled.

Each layer's forward is compiled, and all layers of a class share what is compiled: two layers take as long as eighty.
ZeRO-3 gathers such a layer whole before its forward and its backward, so that compiled code finds its weights there.
Attention over a packed row stays as it is and parts a layer into two pieces: what it computes follows from the lengths
of pairs, and would be compiled anew for each row. The number of tokens is a variable of the compiled code.
"""

from __future__ import annotations

import inspect
import os
import shutil
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsdpo.errors import ConfigError
from dsdpo.objective.attention import NAMES
from dsdpo.objective.decode import CACHES

BACKEND = "inductor"
KEY = "model.torch_compile"


def layers_of(lm: nn.Module) -> list[Any]:
    """The decoder layers of a model of transformers' make. Raises `ConfigError` where there are none."""
    found = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ConfigError(f"{KEY}: {type(lm).__name__} has no layers of transformers' make to compile: leave it out")
    return found


def compile_layers(lm: nn.Module) -> None:
    """Have torch compile the forward of each decoder layer, at its first call."""
    for name in set(NAMES.values()):
        AttentionInterface.register(name, _left_out(ALL_ATTENTION_FUNCTIONS[name]))
    for layer in layers_of(lm):
        kind: Any = type(layer)
        layer.__class__ = _compiled(kind, BACKEND)
        deepspeed.utils.set_z3_leaf_module(layer, True)


@lru_cache(maxsize=8)
def _left_out(function: Any) -> Any:
    """The function as the compiler is to see it: one that it does not look into."""
    if hasattr(function, "left_out"):
        return function
    outside = torch.compiler.disable(function)
    outside.left_out = True
    return outside


@lru_cache(maxsize=8)
def _compiled(kind: Any, backend: str) -> Any:
    """The layer class with a compiled forward; what transformers does around it, checkpointing, stays outside."""
    if hasattr(kind, "eager_forward"):
        return kind
    eager = inspect.unwrap(kind.forward)
    compiled = torch.compile(eager, dynamic=True, backend=backend)

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        # With a cache (samples) the code of each layer is another one, and rows grow by a token a pass.
        function = compiled if all(options.get(name) is None for name in CACHES) else eager
        return function(self, *inputs, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "eager_forward": eager, "__module__": kind.__module__})


def compiler_refusal(device: str) -> str | None:
    """Why torch cannot compile for a kind of device here, and what to install; None if it can."""
    if device == "cpu":
        compiler = os.environ.get("CXX") or "g++"
        return None if shutil.which(compiler) else f"needs a C++ compiler, and {compiler} is not there: install g++"
    if find_spec("triton") is None:
        return "needs triton, which is not installed: pip install triton"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    if not any(map(shutil.which, compilers)):
        return f"needs a C compiler for triton, and {' or '.join(compilers)} is not there: install gcc"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 0):
        return "needs a GPU of compute capability 7.0 (Volta) or later"
    return None
