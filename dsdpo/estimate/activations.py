"""Memory that passes over a model take beside its weights, from a rehearsal of the model's own code without memory.

The model stands on torch's meta device, where tensors have shapes and no content. Its forward and backward pass run
there as in training, and every tensor that comes and goes is counted: any architecture is measured by its own code.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from dsdpo.objective.output_head import base_lm, decoder_of

REHEARSED = "dsdpo_rehearsed"  # the name under which transformers finds the attention of rehearsals


@dataclass(frozen=True)
class PassSize:
    """What one pass takes on one rank."""

    rows: int
    width: int  # tokens of a row
    scored: int  # positions that reach the output head
    keys: int  # keys in a layer's attention, more than tokens where several responses attend to one prompt

    @property
    def tokens(self) -> int:
        """Positions that the layers compute."""
        return self.rows * self.width


@dataclass(frozen=True)
class Activations:
    """Bytes beside weights and gradients in a forward and backward pass, or in a forward pass alone."""

    kept: int  # by the layers for the backward pass, when the head begins
    layers: int  # most beside `kept` while layers are at work, in either direction
    head: int  # most beside `kept` while the output head is at work: a chunk of logits, the gradient of its weight
    on_host: int = 0  # what layers keep in host memory

    @property
    def peak(self) -> int:
        """Most at a time."""
        return self.kept + max(self.layers, self.head)


def rehearse(lm: Any, size: PassSize, *, chunk: int, trains: bool, kept_on_host: bool = False) -> Activations:
    """What a pass over `lm`, a whole model on the meta device, would take.

    `chunk`: positions that the head takes at a time. With `kept_on_host` what layers keep goes to the host. Raises
    `RuntimeError` for models whose code asks for the content of tensors.
    """
    inner, head = base_lm(lm), lm.get_output_embeddings()
    decoder = decoder_of(lm)
    with ExitStack() as stack:
        stack.enter_context(_attention_of(inner, size.keys / size.tokens))
        stack.enter_context(_gradients_dropped(lm))
        stack.enter_context(_torch_linear())
        stack.enter_context(torch.set_grad_enabled(trains))
        ids = torch.empty(size.rows, size.width, dtype=torch.int64, device="meta")
        places = torch.empty(size.scored, dtype=torch.int64, device="meta")
        count = stack.enter_context(_Count())
        host = _Host()
        with torch.autograd.graph.saved_tensors_hooks(host.take, host.give) if kept_on_host else nullcontext():
            output = decoder(input_ids=ids, position_ids=torch.empty_like(ids), use_cache=False)
        hidden = output.last_hidden_state
        del output
        kept, forward = count.now, count.peak
        count.restart()
        leaf = hidden.detach().requires_grad_(trains)
        logps = head(leaf.flatten(0, 1).index_select(0, places), places, chunk)
        if trains:
            logps.sum().backward()
            del logps
            at_head = count.peak
            count.restart()
            hidden.backward(leaf.grad)
        else:
            at_head = count.peak
    return Activations(kept, max(forward, count.peak, kept) - kept, max(at_head, kept) - kept, host.held)


@contextmanager
def _torch_linear() -> Iterator[None]:
    """torch's own `linear`: DeepSpeed's `zero.Init` replaces it for the whole process, for good (0.19)."""
    replaced = nn.functional.linear
    nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        nn.functional.linear = replaced


def by_formula(lm: Any, size: PassSize, *, chunk: int, trains: bool) -> Activations:
    """The same for models that cannot be rehearsed: what a layer of Llama's make keeps, by the model's sizes.

    Of each token 9 vectors of the hidden size, keys and values, and 4 of the MLP's; with gradient checkpointing the
    input of each layer.
    """
    config = base_lm(lm).config.get_text_config()
    b, hidden, layers = next(lm.parameters()).element_size(), config.hidden_size, config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys = heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    layer = b * size.tokens * (9 * hidden + 2 * keys + 4 * inner)
    head = lm.get_output_embeddings().weight
    logits = min(chunk, size.scored) * head.shape[0] * ((8 + b) if trains else 4)
    logits += head.numel() * (4 + b) if trains and head.requires_grad else 0
    if not trains:
        return Activations(b * size.tokens * hidden, layer // 2, logits)
    if getattr(base_lm(lm), "is_gradient_checkpointing", False):
        return Activations(b * size.tokens * hidden * layers, layer, logits)
    return Activations(layer * layers, layer // 4, logits)


class _Host:
    """What is moved to host memory until the backward pass, as by `torch.autograd.graph.save_on_cpu`."""

    def __init__(self) -> None:
        self.held = 0

    def take(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.held += tensor.numel() * tensor.element_size()
        return tensor.shape, tensor.dtype

    def give(self, taken: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(taken[0], dtype=taken[1], device="meta")


class _Count(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):  # a parameter, or what was there before: not made here
                self._known.setdefault(given.untyped_storage())
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._see(made.untyped_storage())
        return result

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak = self.now

    def _see(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = None
        self._change(size)
        weakref.finalize(storage, self._change, -size)

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class _Attention(torch.autograd.Function):
    """A flash attention's memory: it keeps queries, keys, values, results and normalizers, and no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spread: float) -> Tensor:
        rows, heads, width, _ = query.shape
        if spread > 1.0:  # keys of a shared prompt are copied for each response
            key, value = (part.new_empty(*part.shape[:2], int(width * spread), part.shape[3]) for part in (key, value))
        result = query.new_empty(rows, width, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(rows, heads, width, dtype=torch.float32))
        ctx.width = width
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, _, _ = ctx.saved_tensors
        grads = [torch.empty_like(part) for part in (query, key, value)]
        narrow = [
            part if part.shape[2] == ctx.width else part.new_empty(*part.shape[:2], ctx.width, part.shape[3])
            for part in grads
        ]
        return (*narrow, None)


class _FusedNorm(torch.autograd.Function):
    """Memory of Liger's RMSNorm: it keeps its input and a number a token, and works on the gradient in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.empty_like(ctx.saved_tensors[1])


def fuse_norms(lm: nn.Module) -> None:
    """Have a blank model's norms take the memory of Liger's: transformers' own keep copies in float32."""
    for module in lm.modules():
        if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
            module.forward = partial(_fused, module)


def _fused(module: nn.Module, hidden: Tensor) -> Any:
    return _FusedNorm.apply(hidden, module.weight)


@contextmanager
def _attention_of(inner: Any, spread: float) -> Iterator[None]:
    """A block in which the model's attention, where it is transformers' to choose, only takes memory."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value, spread), None

    AttentionInterface.register(REHEARSED, attention)
    config = inner.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = REHEARSED
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _gradients_dropped(lm: nn.Module) -> Iterator[None]:
    """A block in which gradients of parameters go as they come, as DeepSpeed takes them into its own buffers."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
