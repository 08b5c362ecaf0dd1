"""Which parts of a causal language model dsdpo scores with, and what the model does to its logits besides.

Between a model's decoder and its logits stands a linear head, and around the head some models scale, soft-cap or cut.
What a model does there is found by running that part of its own code on known numbers, so it needs no list of names
and holds for code that comes with a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dsdpo.errors import ConfigError
from dsdpo.objective.types import CausalLM

PROBED = 8  # tokens that the code around the head is run on
TINY, HUGE = 1e-3, 1e6  # logits that a soft-cap leaves alone, and that it caps whole
ROUNDS = 2e-5  # relative and absolute, of float32 code on numbers of this size


@dataclass(frozen=True)
class LogitTransform:
    """What a model does around its head: scale hidden states; then scale logits, soft-cap them, cut the vocabulary."""

    scale: float = 1.0
    softcap: float | None = None  # of the scaled logits (Gemma 2, arXiv 2408.00118)
    hidden_scale: float = 1.0
    vocabulary: int | None = None  # logits that count, the first ones; None: all

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitTransform:
        """The transform under the names that most configurations of transformers use for it."""
        text = config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere multiplies
        if divisor := getattr(text, "logits_scaling", None):  # Granite divides
            scale /= float(divisor)
        softcap = getattr(text, "final_logit_softcapping", None)
        return cls(scale, float(softcap) if softcap else None)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def backward(self, grad: Tensor, transformed: Tensor) -> Tensor:
        """Gradient before the transform, given the gradient after it and its output."""
        if self.softcap is not None:
            grad = grad * (1.0 - (transformed / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


def base_lm(lm: CausalLM) -> Any:
    """The model itself, without peft's wrapper."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def decoder_of(lm: CausalLM) -> Any:
    """The part of a causal language model from token ids to hidden states.

    transformers' own `get_decoder` is right for most; some models have another part of that name. Raises `ConfigError`
    where there is none.
    """
    inner, head = base_lm(lm), lm.get_output_embeddings()
    try:
        embeddings = inner.get_input_embeddings()
        candidates = [inner.get_decoder(), inner.base_model]
    except (AttributeError, NotImplementedError, KeyError):  # what models of an unusual make raise
        embeddings, candidates = None, []
    for candidate in [*candidates, *inner.children()]:
        if candidate is inner or embeddings is None:
            continue
        parts = {id(part) for part in candidate.modules()}
        if id(embeddings) in parts and id(head) not in parts:
            return candidate
    raise ConfigError(f"{type(inner).__name__} has no decoder that turns token ids into hidden states; {ADVICE}")


ADVICE = "dsdpo trains causal language models made of a decoder and a linear output head: choose another model"


def linear_heads(head: Any) -> list[Any]:
    """The modules that compute an output head: itself, or the copies between which an adapter's wrapper chooses."""
    original = getattr(head, "original_module", None)
    return [head] if original is None else [original, *head.modules_to_save.values()]


def logit_transform(lm: CausalLM) -> LogitTransform:
    """What `lm` does between its decoder and its logits, besides the head.

    Raises `ConfigError` if that is more than a `LogitTransform` says.
    """
    name = type(base_lm(lm)).__name__
    known = LogitTransform.of(lm.config)
    seen = _run_around_head(lm)
    if not seen.decoder_ran:  # the model's own code does not run without its weights: the check at start has the say
        return known
    if seen.head_input is None or seen.head_input.shape != seen.hidden.shape:
        raise ConfigError(f"{name} does more than one linear layer with its decoder's output; {ADVICE}")
    hidden, given = seen.hidden.flatten(0, 1).double(), seen.head_input.flatten(0, 1).double()
    hidden_scale = _snapped(float((given * hidden).sum() / (hidden * hidden).sum()))
    if not torch.allclose(given, hidden * hidden_scale, ROUNDS, ROUNDS):
        raise ConfigError(f"{name} does more than one linear layer with its decoder's output; {ADVICE}")
    if seen.logits is None or seen.logits.dim() != 3:
        raise ConfigError(f"{name} gives no logits that dsdpo can follow; {ADVICE}")
    logits = seen.logits.flatten(0, 1).double()
    size = logits.shape[-1]
    raw = seen.head_output.flatten(0, 1)[:, :size].double()
    common: dict[str, Any] = {"hidden_scale": 1.0 if abs(hidden_scale - 1) < 1e-6 else hidden_scale}
    common["vocabulary"] = size if size < seen.head_output.shape[-1] else None
    for transform in (replace(known, **common), replace(_measured(raw, logits), **common)):
        if len(logits) == len(raw) and torch.allclose(transform(raw), logits, ROUNDS, ROUNDS):
            return transform
    raise ConfigError(f"{name} changes its logits after the output head in a way that dsdpo does not follow; {ADVICE}")


@dataclass
class _Seen:
    hidden: Tensor  # (1, PROBED, H) that the stand-in for the decoder answered
    head_output: Tensor  # (1, PROBED, V) that the stand-in for the head answered
    decoder_ran: bool = False
    head_input: Tensor | None = None
    logits: Tensor | None = None


class _Answer(tuple):
    """A model's output that has hidden states alone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary."""
        return getattr(self, name) if name == "last_hidden_state" else default


@torch.no_grad()
def _run_around_head(lm: CausalLM) -> _Seen:
    """The model's own forward, with known numbers in place of what decoder and head compute. Touches no weights."""
    inner, decoder, head = base_lm(lm), decoder_of(lm), lm.get_output_embeddings()
    linear, random = linear_heads(head)[0], torch.Generator().manual_seed(0)
    seen = _Seen(
        hidden=torch.randn(1, PROBED, linear.in_features, generator=random),
        head_output=torch.randn(1, PROBED, linear.out_features, generator=random) * 10,
    )
    seen.head_output[:, 0], seen.head_output[:, 1] = TINY, HUGE

    def decode(*_: Any, **__: Any) -> _Answer:
        seen.decoder_ran = True
        return _Answer((seen.hidden,))

    def project(given: Tensor, *_: Any, **__: Any) -> Tensor:
        if seen.head_input is None:
            seen.head_input = given
        return seen.head_output.clone()

    path = next(name for name, module in inner.named_modules() if module is decoder).split(".")
    outer = [inner.get_submodule(".".join(path[: end + 1])) for end in range(len(path))]
    ids = torch.zeros(1, PROBED, dtype=torch.int64)
    with ExitStack() as stack:
        for module in outer:
            stack.enter_context(_instead(module, decode))
        stack.enter_context(_instead(head, project))
        with torch.device("cpu"):
            try:
                answer = inner.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            except Exception:  # whatever code that meets no weights may raise; what was seen until then decides
                return seen
    logits = getattr(answer, "logits", None)
    seen.logits = logits if isinstance(logits, Tensor) else None
    return seen


@contextmanager
def _instead(module: nn.Module, forward: Any) -> Iterator[None]:
    """A block in which calling `module` calls `forward`."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def _measured(raw: Tensor, logits: Tensor) -> LogitTransform:
    """Scale and soft-cap from what became of a tiny and a huge logit."""
    scale = _snapped(float(logits[0, 0] / raw[0, 0]))
    cap = abs(float(logits[1, 0]))
    capped = cap < 0.5 * abs(scale) * HUGE
    return LogitTransform(scale, _snapped(cap) if capped else None)


def _snapped(value: float) -> float:
    """The value as a configuration would state it: six digits, where those are as near as float32 tells."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 2e-6 * abs(value) else value
