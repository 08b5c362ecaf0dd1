"""Answers of a causal language model, a token at a time, for several prompts at once.

Shapes: B prompts, T tokens of the longest so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsdpo.objective.output_head import base_lm

CACHES = ("cache", "past_key_values")  # what forward calls keys and values, from transformers 5.24 on and before


class Decoding:
    """What has been read and written of B prompts, which stand at the right end of padded rows."""

    def __init__(self, prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> None:
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        self.ids, self.mask = (torch.from_numpy(part).to(device) for part in (ids, mask))  # (B, T) int64
        self.cache: Any = None  # keys and values of all tokens but the last, once a pass has made them

    def append(self, tokens: Tensor) -> None:
        """Add a token (B,) to each row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], dim=1)

    def next_logits(self, lm: Any) -> Tensor:
        """Logits (B, V) float32 of the next token, from the tokens that no pass has read, or from all without a cache.

        The model's own, by its own forward: no chunks, the head reads one position of each row.
        """
        inner = base_lm(lm)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        unread = slice(-1, None) if self.cache is not None else slice(None)
        known = inspect.signature(inner.forward).parameters
        cache = next((name for name in CACHES if name in known), None)
        inputs = {
            "input_ids": self.ids[:, unread],
            "attention_mask": self.mask,
            "position_ids": positions[:, unread],
            "use_cache": True,
            "logits_to_keep": 1,
        } | ({} if cache is None else {cache: self.cache})
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        needless = () if takes_more else ("position_ids",)
        for name in ("logits_to_keep", *needless):
            if name not in known:
                del inputs[name]
        answer = inner(**inputs)
        self.cache = None if cache is None else getattr(answer, cache, None)
        logits: Tensor = answer.logits[:, -1]
        return logits.float()


class TokenChoice:
    """How the next token of each prompt is chosen: the likeliest, or drawn from a stream of the prompt's own.

    Streams are made of a seed and the prompt's number, so that neither other prompts nor ranks nor what else draws at
    random in the process has a part in an answer; and nothing else is changed by drawing.
    """

    def __init__(self, numbers: Sequence[int], *, temperature: float, top_p: float, seed: int) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._streams = [np.random.default_rng([seed, number]) for number in numbers]

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (B,) int64 for logits (B, V)."""
        if self._temperature == 0.0:
            return logits.argmax(-1)
        shares, tokens = (logits.double() / self._temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = shares.cumsum(-1) - shares
        shares = torch.where(before < self._top_p, shares, 0.0)  # the likeliest always stays
        drawn = torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64, device=logits.device)
        reached = shares.cumsum(-1) <= drawn[:, None] * shares.sum(-1, keepdim=True)
        places = torch.minimum(reached.sum(-1), (shares > 0).sum(-1) - 1)
        return tokens.gather(-1, places[:, None]).squeeze(-1)
