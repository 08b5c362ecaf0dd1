"""A look at the truth before training: are an engine's log-probs the model's own, and the same each time?

A few short pairs are scored under the real engines. What no source code can promise shows here: a logit scale that
dsdpo does not know, noise that only training has, a model that mixes tokens of packed pairs, weights that one engine
has and the other lacks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdpo.config.model import ModelConfig
from dsdpo.console import say
from dsdpo.data.batch import PreferenceBatch, filler
from dsdpo.data.binning import LayoutName
from dsdpo.data.collate import collate
from dsdpo.data.pairs import Group
from dsdpo.data.steps import BatchSource
from dsdpo.distributed import gather_objects
from dsdpo.engine.build import device
from dsdpo.engine.quirks.gather_trace import SecondOrder
from dsdpo.engine.shards import nonfinite_parameters
from dsdpo.engine.types import InferenceEngine
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import ROUNDING
from dsdpo.objective.output_head import base_lm

LONGEST = 1024  # tokens of a sampled pair: attention over padded rows costs their square
# A response of few tokens has few over which rounding averages out: one logit of 30 in bfloat16 is off by up to 0.06.
SPARE_TOKENS = 128
# Tokens of one sequence whose logits are held whole; of each, rounding makes on average what it makes of such a logit.
WHOLE_LOGITS, SPARE_LOGIT = 128, 32.0
# Of what rounding explains between layouts; the same pass twice differs by the order of sums at most.
REPEATED = 0.25


@dataclass(frozen=True)
class Answers:
    """What an engine said of the sampled pairs."""

    logps: Tensor  # (nB,) float32
    tokens: Tensor  # (nB,) int64
    dtype: str  # that it computes in
    name: str  # of the model, for messages
    seconds: float

    def allowed(self, share: float = 1.0) -> Tensor:
        """(nB,) what rounding explains of a difference."""
        return share * ROUNDING[self.dtype] * (self.logps.abs() + self.tokens + SPARE_TOKENS)


@torch.no_grad()
def check_engine(
    engine: InferenceEngine,
    source: BatchSource,
    *,
    dtype: str,
    key: str,
    trains: bool = False,
    order: SecondOrder | None = None,
) -> Answers:
    """Score a few pairs as the run will and as the model itself does. Collective.

    `key` is the setting that the model comes from, `trains` says that the engine also scores in training mode. Raises
    `ConfigError` on all ranks if on any the same batch gets other log-probs a second time, packed pairs get others than
    padded ones, or both get others than the model's own logits give. A training engine must have had its warm-up pass;
    `order` is the record of gathers that the engine keeps for such passes, if it has one.
    """
    started = time.perf_counter()
    name = f"{key}: {type(base_lm(engine.module.lm)).__name__}"
    groups = source.sample(longest=LONGEST)
    padded, ours = (_laid_out(groups, layout, source.pad_token_id) for layout in ("padded", source.layout))
    together, alone = _whole_sequences(groups, source.pad_token_id)
    with _same_mode_after(engine), (order or SecondOrder(engine)).recorded_apart(), _without_dropout(engine.module):
        engine.eval()
        per_token = engine(batch=together), engine(batch=alone, own_logits=True)
        plain = engine(batch=padded)
        engine.train(trains)
        first, second = engine(batch=ours), engine(batch=ours)
    tokens = torch.zeros_like(plain, dtype=torch.int64)
    tokens.index_add_(0, padded.response, torch.ones_like(padded.response))
    answers = Answers(plain, tokens, dtype, name, time.perf_counter() - started)
    _refuse_nonfinite(engine.module, answers)
    agree(
        _repeats(first, second, answers, training=trains)
        or _as_own_logits(*per_token, answers)
        or _as_padded(first, answers, layout=source.layout)
    )
    return answers


def computing_dtype(config: dict[str, Any], model: ModelConfig) -> str:
    """What an engine of this DeepSpeed config computes in: the model's dtype, unless autocast makes it another."""
    if model.quantization is not None and model.quantization.bits == 8:
        return "e4m3"
    autocast, dtype = config.get("torch_autocast", {}), model.dtype
    return str(autocast.get("dtype", dtype)).removeprefix("torch.") if autocast.get("enabled") else dtype


def check_same(policy: Answers, reference: Answers) -> None:
    """Raise `ConfigError` on all ranks unless both gave the same answers but for rounding. Collective.

    For a reference that has the weights that the policy starts from.
    """
    finer = min(policy, reference, key=lambda answers: ROUNDING[answers.dtype])
    difference, allowed = (policy.logps - reference.logps).abs(), finer.allowed()
    worst = int((difference - allowed).nan_to_num(torch.inf).argmax())
    wrong = policy.logps.isfinite() & ~(difference <= allowed)
    agree(
        f"{reference.name}: the reference has the weights that the policy starts from, but gives a response of "
        f"{policy.tokens[worst]} tokens {reference.logps[worst]:.4f} nats and the policy {policy.logps[worst]:.4f}, "
        f"where rounding in {finer.dtype} explains {allowed[worst]:.4f}: make the DeepSpeed JSONs of both agree in all "
        "that decides numbers (torch_autocast, quantization, dtypes)"
        if wrong.any()
        else None
    )


def _laid_out(groups: list[Group], layout: LayoutName, pad_token_id: int) -> PreferenceBatch:
    return filler(collate(groups, layout=layout, pad_token_id=pad_token_id)).to(device())


def _whole_sequences(groups: list[Group], pad_token_id: int) -> tuple[PreferenceBatch, PreferenceBatch]:
    """All sequences in one padded batch, and the shortest alone without padding; of both its last tokens are scored."""
    sequences = [np.r_[group.prompt, response] for group in groups for response in group.responses if len(response)]
    shortest = min(range(len(sequences)), key=lambda index: len(sequences[index]))
    whole = [Group.of(0, sequence[:1], sequence[1:]) for sequence in sequences]
    together, alone = (_laid_out(part, "padded", pad_token_id) for part in (whole, [whole[shortest]]))
    return last_tokens(together, shortest), last_tokens(alone, 0)


def last_tokens(batch: PreferenceBatch, response: int) -> PreferenceBatch:
    """The same rows with the last tokens of one response, each as if it were a response of its own."""
    keep = (batch.response == response).nonzero().squeeze(-1)[-WHOLE_LOGITS:]
    return replace(
        batch,
        score_at=batch.score_at[keep],
        targets=batch.targets[keep],
        response=torch.arange(len(keep), device=keep.device),
        pair_ids=batch.pair_ids[:1].expand(len(keep)),
        group_size=1,
    )


def agree(refusal: str | None) -> None:
    """Raise the first rank's refusal on all ranks, if any has one. Collective."""
    for text in gather_objects(refusal):
        if text is not None:
            raise ConfigError(text)


def _refuse_nonfinite(module: nn.Module, answers: Answers) -> None:
    """Raise `ConfigError` on all ranks where finite weights give no response a finite log-prob. Collective.

    Single pairs may have none: training stops at them and names them. Weights that are not finite are named by
    `finite_weights`.
    """
    if any(gather_objects(bool(answers.logps.isfinite().any()))) or nonfinite_parameters(module):
        return
    raise ConfigError(
        f"{answers.name}: no response of a sample has a finite log-prob in {answers.dtype}, though all weights are "
        "finite: compare the numbers in its config.json (norms, rotary embeddings, scales) with those of the original, "
        "or set another model.dtype"
    )


def _repeats(first: Tensor, second: Tensor, answers: Answers, *, training: bool) -> str | None:
    difference, allowed = (first - second).abs(), answers.allowed(REPEATED)
    wrong = first.isfinite() & ~(difference <= allowed)
    if not wrong.any():
        return None
    worst = int((difference / allowed).nan_to_num(torch.inf).argmax())
    mode = " in training mode" if training else ""
    return (
        f"{answers.name} gives the same response of {answers.tokens[worst]} tokens {first[worst]:.4f} nats and then "
        f"{second[worst]:.4f}{mode}: it draws at random where policy and reference must be one function; set what "
        "makes it do so (noise, jitter, layer drop) to 0 in its config.json"
    )


def _as_own_logits(ours: Tensor, own: Tensor, answers: Answers) -> str | None:
    finite = own.isfinite()  # others say nothing here; training stops at them and names the pair
    if not finite.any():
        return None
    ours, own = ours[finite], own[finite]
    difference, allowed = (ours - own).abs().mean(), ROUNDING[answers.dtype] * (own.abs().mean() + SPARE_LOGIT)
    if difference <= allowed:
        return None
    return (
        f"{answers.name}: {len(own)} tokens get {ours.mean():.4f} nats each on average from dsdpo and {own.mean():.4f} "
        f"from the model's own logits, {difference:.4f} apart where rounding in {answers.dtype} explains "
        f"{allowed:.4f}: it does something that dsdpo does not follow; choose another model, and please report it"
    )


def _as_padded(ours: Tensor, answers: Answers, *, layout: str) -> str | None:
    plain, allowed = answers.logps, answers.allowed()
    wrong = plain.isfinite() & ~((ours - plain).abs() <= allowed)
    if not wrong.any():
        return None
    worst = int(((ours - plain).abs() / allowed).nan_to_num(torch.inf).where(wrong, -1.0).argmax())
    what, cure = (
        ("the packed layout", "set data.layout to padded")
        if layout == "packed"
        else ("training mode", "choose another model")
    )
    return (
        f"{answers.name} gives a response of {answers.tokens[worst]} tokens {ours[worst]:.4f} nats in {what} and "
        f"{plain[worst]:.4f} without it, where rounding in {answers.dtype} explains {allowed[worst]:.4f}: {cure}, and "
        "please report the model"
    )


@contextmanager
def _same_mode_after(engine: InferenceEngine) -> Iterator[None]:
    was_training = engine.module.training
    try:
        yield
    finally:
        engine.train(was_training)


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """A block without the dropout that is meant: LoRA's."""
    layers = [(part, part.p) for part in module.modules() if isinstance(part, nn.Dropout) and part.p]
    for part, _ in layers:
        part.p = 0.0
    try:
        yield
    finally:
        for part, p in layers:
            part.p = p


def describe(*answers: Answers) -> None:
    """Say what the look at the truth found and took."""
    seconds = sum(part.seconds for part in answers)
    say(f"checked: log-probs are the models' own, and the same each time ({seconds:.1f} s)")


def measured_bias(policy: Answers, reference: Answers) -> dict[str, float]:
    """How far a reference with the policy's weights in fewer bits is from it before training, in nats of a response.

    The part that chosen and rejected share cancels in the loss; what is left is the size of an error in its margin.
    """
    difference = (reference.logps - policy.logps).double()
    size = difference.abs().mean() / policy.tokens.double().clamp(min=1).mean()
    found = {"mean": difference.mean(), "spread": difference.std(), "size_per_token": size}
    return {name: round(float(value), 6) for name, value in found.items()}
