"""Log-probabilities of responses, without ever holding a (tokens, vocabulary) matrix.

Shapes: B pairs, R rows of T tokens, N response tokens in all, H hidden size, V vocabulary.

Only the hidden states that predict a response token reach the output head, and the head works through them in
chunks: logits of one chunk live at a time, in the forward pass and, recomputed, in the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdpo.data.batch import Packed, Padded, PreferenceBatch
from dsdpo.errors import ConfigError
from dsdpo.objective.attention import NAMES
from dsdpo.objective.chunked_head import ChunkedHead
from dsdpo.objective.decode import Decoding
from dsdpo.objective.offload import kept_on_host
from dsdpo.objective.output_head import base_lm, decoder_of, linear_heads, logit_transform
from dsdpo.objective.router import Routing, loads
from dsdpo.objective.sequence_parallel import own_part, sum_over_group
from dsdpo.objective.token_weights import TokenWeights
from dsdpo.objective.types import CausalLM
from dsdpo.sequence_group import SequenceGroup

LOGPS_VERSION = 2  # raise it when the same weights and tokens come to give other log-probs: stored ones become unusable

FUSED_HEAD = "dsdpo.objective.fused_head"  # imported where it is chosen, since it imports Triton

# What other batches, layouts, kernels and machines may make of the same log-prob, per nat and response token.
# e4m3, of a reference that multiplies in 8 bits: what differs in 16 bits is made four times as much by rounding to 3.
ROUNDING = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5, "e4m3": 16e-3}


@dataclass(frozen=True)
class PairLogps:
    """log p(response | prompt) of B pairs, summed over response tokens, in nats: one column a field."""

    chosen: Tensor  # (B,) float32
    rejected: Tensor  # (B,) float32
    chosen_tokens: Tensor  # (B,) int64: length normalisation is the loss's decision
    rejected_tokens: Tensor  # (B,) int64

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def group_size(self) -> int:
        """Responses of the largest group."""
        return 2

    @classmethod
    def zeros(cls, n: int, *, device: torch.device | str = "cpu") -> PairLogps:
        """n pairs of log-prob 0 over no tokens."""
        logps, tokens = torch.zeros(2, n, device=device), torch.zeros(2, n, dtype=torch.int64, device=device)
        return cls(*logps, *tokens)

    @staticmethod
    def zeros_of(n: int, *, group_size: int) -> PairLogps:
        """The same of n groups: pairs, or lists of up to `group_size` responses where that is more than 2."""
        pairs = PairLogps.zeros(n)
        if group_size <= 2:
            return pairs
        lists = {"responses": torch.zeros(n, group_size)}
        lists["response_tokens"] = torch.zeros(n, group_size, dtype=torch.int64)
        return ListLogps(**pairs.columns(), **lists)

    @staticmethod
    def of_columns(columns: Mapping[str, Tensor]) -> PairLogps:
        """What `columns` gave: pairs, or lists."""
        return (ListLogps if "responses" in columns else PairLogps)(**columns)

    @classmethod
    def cat(cls, parts: Sequence[PairLogps]) -> PairLogps:
        """The pairs or lists of all parts, in order; lists as wide as the widest of them."""
        kind = type(parts[0])
        columns = {name: [part.columns()[name] for part in parts] for name in parts[0].columns()}
        return kind(**{name: torch.cat(_equally_wide(values)) for name, values in columns.items()})

    @classmethod
    def from_numpy(cls, columns: Mapping[str, np.ndarray]) -> PairLogps:
        """What `numpy` gave, on the CPU."""
        floats = {"chosen", "rejected", "responses"}
        dtypes = {name: torch.float32 if name in floats else torch.int64 for name in columns}
        return cls.of_columns({name: torch.tensor(values, dtype=dtypes[name]) for name, values in columns.items()})

    def numpy(self) -> dict[str, np.ndarray]:
        """The columns by name, (B,) each."""
        return {name: column.cpu().numpy() for name, column in self.detach().columns().items()}

    def columns(self) -> dict[str, Tensor]:
        """The columns by name, (B,) each."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def split(self, sizes: Sequence[int]) -> list[PairLogps]:
        """Consecutive parts of these sizes."""
        parts = {name: column.split(list(sizes)) for name, column in self.columns().items()}
        return [type(self)(**{name: parts[name][index] for name in parts}) for index in range(len(sizes))]

    def take(self, rows: Tensor | np.ndarray) -> PairLogps:
        """The pairs at these places, or where `rows` (B,) is true."""
        return self._map(lambda column: column[torch.as_tensor(rows, device=column.device)])

    def put(self, rows: Tensor | np.ndarray, values: PairLogps) -> None:
        """Overwrite the pairs at these places."""
        for name, column in self.columns().items():
            column[torch.as_tensor(rows, device=column.device)] = values.columns()[name].to(column)

    def narrowed(self, group_size: int) -> PairLogps:
        """The same of lists that all have at most `group_size` responses, no wider than that."""
        return self._map(lambda column: column[:, :group_size] if column.dim() > 1 else column)

    def to(self, device: torch.device | str) -> PairLogps:
        return self._map(lambda column: column.to(device))

    def detach(self) -> PairLogps:
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PairLogps:
        return type(self)(**{name: change(column) for name, column in self.columns().items()})


@dataclass(frozen=True)
class NoLogps(PairLogps):
    """What stands for the log-probs of a reference where there is none: zeros."""


@dataclass(frozen=True)
class ListLogps(PairLogps):
    """Of B lists of up to n responses, best first: chosen is a list's first response, rejected its last."""

    responses: Tensor  # (B, n) float32, 0 where there is no such response
    response_tokens: Tensor  # (B, n) int64

    @property
    def group_size(self) -> int:
        return self.responses.shape[1]


def _equally_wide(columns: Sequence[Tensor]) -> list[Tensor]:
    """Columns (B,) as they are; columns (B, n) with zeros behind them up to the largest n."""
    if columns[0].dim() == 1:
        return list(columns)
    width = max(column.shape[1] for column in columns)
    return [nn.functional.pad(column, (0, width - column.shape[1])) for column in columns]


def logps_of(logps: Tensor, tokens: Tensor) -> PairLogps:
    """Log-probs and tokens (n, B) of the responses of B pairs, or of B lists where n is more than 2."""
    assert len(logps) >= 2, "groups of one response are no pairs"
    if len(logps) == 2:
        return PairLogps(logps[0], logps[1], tokens[0], tokens[1])
    last = last_responses(tokens)
    ends = (part.gather(0, last[None]).squeeze(0) for part in (logps, tokens))
    rejected, rejected_tokens = ends
    return ListLogps(logps[0], rejected, tokens[0], rejected_tokens, logps.T, tokens.T)


def last_responses(tokens: Tensor) -> Tensor:
    """(B,) int64: which of n responses is a list's last, from their tokens (n, B)."""
    return ((tokens > 0) * torch.arange(len(tokens), device=tokens.device)[:, None]).amax(0)


def pair_logps(model: Callable[..., Tensor], batch: PreferenceBatch) -> PairLogps:
    """One forward pass of `model` on pairs or lists; see `response_logps`."""
    return logps_of(*response_logps(model, batch))


def response_logps(model: Callable[..., Tensor], batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Summed log-prob (n, B) float32 and learned tokens (n, B) int64 of the responses of B groups, 0 where there is
    none, from one forward pass of `model`: a `ResponseScorer`, or the engine around one (then collective under ZeRO-3).
    """
    shape = batch.group_size, batch.num_pairs
    return model(batch=batch).view(shape), token_counts(batch).view(shape)


def token_counts(batch: PreferenceBatch) -> Tensor:
    """Learned tokens of each response, (nB,) int64."""
    counts = torch.zeros(batch.num_responses, dtype=torch.int64, device=batch.response.device)
    return counts.index_add_(0, batch.response, torch.ones_like(batch.response))


class ResponseScorer(nn.Module):
    """A causal language model that answers a `PreferenceBatch` with log-probs (nB,) instead of logits."""

    lm: Any  # a CausalLM that is a module, with whatever peft and transformers give it beside
    decoder: Any

    def __init__(
        self,
        lm: CausalLM,
        *,
        activations_on_host: bool = False,
        output_head: str = "chunked",
        token_weights: TokenWeights | None = None,
        sequence: SequenceGroup | None = None,
    ) -> None:
        """`activations_on_host`: what the layers keep for the backward pass goes to the host and comes back for it.

        `output_head`: "chunked", or "fused", which needs Triton.
        `token_weights`: how much each token counts in a response's sum; None: all alike. `sequence`: the ranks over
        which the tokens of packed rows are split.
        """
        super().__init__()
        self.lm = lm
        self.token_weights = token_weights
        self.sequence = sequence if sequence is not None and sequence.size > 1 else None
        self.activations_on_host = activations_on_host
        head = lm.get_output_embeddings()
        for linear in linear_heads(head):
            if type(linear) is not nn.Linear:
                raise ConfigError(
                    f"the output head of {type(base_lm(lm)).__name__} is a {type(linear).__name__}; dsdpo scores "
                    "models whose head is a plain torch.nn.Linear"
                )
        transform = logit_transform(lm)
        vars(self)["decoder"] = decoder_of(lm)  # not as a module: its parameters would have two names
        for linear in linear_heads(head):
            # Same parameters, names and hooks, another forward: ZeRO-3 gathers the weight once per pass, as for any
            # module.
            linear.__class__ = ChunkedHead
            vars(linear)["transform"] = transform
            vars(linear)["kernels"] = import_module(FUSED_HEAD) if output_head == "fused" else None

    def forward(
        self,
        batch: PreferenceBatch | None = None,
        *,
        extras: tuple[str, ...] = (),
        own_logits: bool = False,
        per_token: bool = False,
        routing: Routing | None = None,
        decoding: Decoding | None = None,
    ) -> Any:
        """Summed log-prob of each response, (nB,) float32: response k of group i at k * B + i.

        With `extras`, a row of such sums for each after it, (1 + E, nB): "plain", the log-probs with every token
        counted once; "alignment" and "entropy", see `ChunkedHead`, without gradient.
        With `routing`, it and how the routers have dealt out the tokens that this rank computes, see `router.loads`.

        `own_logits` takes them from the logits of the model's own forward pass, all of them in memory: for checks.
        `per_token` gives the log-prob of each of `batch.targets`, (N,), in place of sums; not over a `sequence`.
        The tokens of a packed row are split over the ranks of `sequence`, which get the same batch and all return the
        sums over the whole row: then collective in that group.

        With a `decoding` in place of a batch: logits (B, V) of the next token of its prompts. ZeRO-3 counts as one pass
        only what begins at the module that the engine was made of.
        """
        if decoding is not None:
            return decoding.next_logits(self.lm)
        assert batch is not None
        weights = None if self.token_weights is None else self.token_weights(batch)
        if own_logits:
            return _sum(self._own_logps(batch), batch, weights).float()
        group = self.sequence if isinstance(batch.attention, Packed) else None
        part = batch
        if group is not None:
            part, mine = own_part(batch, group)
            weights = None if weights is None else weights[mine]
        inputs = {"input_ids": part.input_ids, "position_ids": part.position_ids, "use_cache": False}
        inputs |= attention_inputs(batch, self.lm, group)
        # Under gradient checkpointing these are the inputs of the blocks alone: what is within is recomputed.
        with kept_on_host(part.input_ids.device) if self.activations_on_host else nullcontext():
            output = self.decoder(**inputs, **({"output_router_logits": True} if routing else {}))
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, part.score_at)
        head, of_head = self.lm.get_output_embeddings(), tuple(name for name in extras if name != "plain")
        if per_token:
            return head(hidden, part.targets)
        logps, *others = head(hidden, part.targets, extras=of_head).view(1 + len(of_head), -1)
        rows = {"plain": logps, **{name: row.detach() for name, row in zip(of_head, others, strict=True)}}
        sums = torch.stack([_sum(logps, part, weights), *(_sum(rows[name], part) for name in extras)])
        if group is not None:
            sums = sum_over_group(sums, group)
        answer = sums.float() if extras else sums[0].float()
        return (answer, loads(output.router_logits, part.counted, routing.top_k)) if routing else answer

    def _own_logps(self, batch: PreferenceBatch) -> Tensor:
        """(N,) float32; the head computes logits of the N scored positions only."""
        inner, heads = base_lm(self.lm), linear_heads(self.lm.get_output_embeddings())
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        inputs |= attention_inputs(batch, self.lm)
        known = inspect.signature(inner.forward).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            inputs = {name: value for name, value in inputs.items() if name in known}
        for head in heads:
            vars(head)["only_at"] = batch.score_at
        try:
            logits = inner(**inputs).logits
        finally:
            for head in heads:
                del vars(head)["only_at"]
        logits = logits.flatten(0, -2)
        if len(logits) != len(batch.score_at):  # a model that does not call its head
            logits = logits.index_select(0, batch.score_at)
        return logits.float().log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)


def _sum(values: Tensor, batch: PreferenceBatch, weights: Tensor | None = None) -> Tensor:
    """(nB,) float64 sums of values (N,) of the batch's targets."""
    # Added up in float32, 3,000 tokens of the same log-prob lose half a nat, and on CUDA their order is chance.
    wide = values.double() if weights is None else values.double() * weights
    summed = torch.zeros(batch.num_responses, dtype=torch.float64, device=values.device)
    return summed.index_add(0, batch.response, wide)


def attention_inputs(batch: PreferenceBatch, lm: CausalLM, group: SequenceGroup | None = None) -> dict[str, Any]:
    """What a model's attention is told of a batch, whose row may be split, as arguments of the model."""
    if isinstance(batch.attention, Padded):
        return {"attention_mask": batch.attention.attention_mask}
    name = lm.config._attn_implementation
    assert name in NAMES.values(), f"attention {name} would let all pairs of a packed row see each other"
    # transformers takes a mask of four dimensions for one made by the caller and makes none; its content is not read.
    dummy = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return {"attention_mask": dummy, "packed": batch.attention, **({} if group is None else {"sequence": group})}
