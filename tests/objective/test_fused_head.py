"""The Triton kernels of the output head against whole logits in float64, on the CPU in Triton's interpreter.

On a machine with a GPU tests/gpu does the same there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsdpo.objective.chunked_head import ChunkedHead
from dsdpo.objective.output_head import LogitTransform
from tests.gpu.support import DEVICE, distance

pytest.importorskip("triton", reason="triton is not installed (pip install 'dsdpo[fused]')")

from dsdpo.objective import chunked_head, fused_head

TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled and capped": LogitTransform(scale=0.5, softcap=4.0, hidden_scale=0.7),
    "cut": LogitTransform(vocabulary=301),
}


def answers(
    transform: LogitTransform, dtype: torch.dtype, *, fused: bool | None, extras: tuple[str, ...] = ()
) -> list[Tensor]:
    """Rows of log-probs and extras, and gradients of hidden states, weight and bias; `fused` None: by whole logits."""
    torch.manual_seed(0)
    width, vocabulary, tokens = 40, 331, 150  # of which no size is a whole number of tiles
    low = [torch.randn(tokens, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    leaves = [tensor.to(DEVICE, dtype) for tensor in low]
    leaves = [(leaf.double() if fused is None else leaf).requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    targets = torch.randint(0, 301, (tokens,), device=DEVICE)
    given = torch.randn(tokens, device=DEVICE)
    if fused is None:
        logits = (hidden * transform.hidden_scale) @ weight.T + bias
        log_p = transform(logits[:, : transform.vocabulary]).log_softmax(-1)
        logps = log_p.gather(-1, targets[:, None])[:, 0]
        p = log_p.exp()
        named = {"alignment": logps - (p * p).sum(-1).log(), "entropy": -(p * log_p).sum(-1)}
        rows = torch.stack([logps, *(named[name] for name in extras)])
    else:
        head: Any = torch.nn.Linear(width, vocabulary, device=DEVICE, dtype=dtype)
        head.__class__, head.transform = ChunkedHead, transform
        head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        leaves = [hidden, head.weight, head.bias]
        head.kernels = fused_head if fused else None
        rows = head(hidden, targets, extras=extras).view(1 + len(extras), -1)
    gradients = torch.autograd.grad((rows[0] * given).sum(), leaves)
    return [*rows.detach(), *gradients]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("extras", [(), ("entropy", "alignment")])
def test_float32_equals_whole_logits(name: str, extras: tuple[str, ...]) -> None:
    truth = answers(TRANSFORMS[name], torch.float32, fused=None, extras=extras)
    found = answers(TRANSFORMS[name], torch.float32, fused=True, extras=extras)
    for ours, exact in zip(found, truth, strict=True):
        assert distance(ours, exact) < 2e-6


@pytest.mark.parametrize("name", TRANSFORMS)
def test_bfloat16_is_exact_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradient of the weight summed a block of the vocabulary at a time, and few tokens at a time."""
    monkeypatch.setattr(chunked_head, "SUM_BYTES", 4 * 40 * 150)
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES_ON_CPU", 4 * 331 * 70)
    truth, chunked, fused = (answers(TRANSFORMS[name], torch.bfloat16, fused=which) for which in (None, False, True))
    assert distance(fused[0], truth[0]) < distance(chunked[0], truth[0]), "its logits are not rounded to 16 bits"
    for ours, exact in zip(fused, truth, strict=True):
        assert 0 < distance(ours, exact) < 2**-7  # Triton's interpreter cuts bits off where a GPU rounds


def test_under_autocast() -> None:
    truth = answers(LogitTransform(), torch.float32, fused=None)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = answers(LogitTransform(), torch.float32, fused=True)
    errors = [distance(ours, exact) for ours, exact in zip(found, truth, strict=True)]
    assert all(1e-4 < error < 1e-2 for error in errors[:3]), errors


def test_parts_of_the_vocabulary_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all of it, or one for each tile."""
    truth = answers(LogitTransform(), torch.float32, fused=None, extras=("entropy",))
    for programs in (1, 10_000):
        monkeypatch.setattr(fused_head, "PROGRAMS", programs)
        found = answers(LogitTransform(), torch.float32, fused=True, extras=("entropy",))
        assert max(distance(ours, exact) for ours, exact in zip(found, truth, strict=True)) < 2e-6


def test_no_tokens() -> None:
    """A micro-batch can have none on a rank."""
    hidden, weight = torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.randn(20, 8, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    logps = chunked_head._ChunkedLogp.apply(hidden, weight, None, none, LogitTransform(), 16, (), fused_head)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert hidden.grad is not None
