"""The chunked, response-only log-probs against whole logits, one sequence at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsdpo.data.batch import collate_padded
from dsdpo.data.pairs import Group
from dsdpo.errors import ConfigError
from dsdpo.objective import chunked_head as module
from dsdpo.objective.chunked_head import ChunkedHead
from dsdpo.objective.logps import PairLogps, ResponseScorer, pair_logps
from dsdpo.objective.output_head import LogitTransform
from tests.tiny import plain_logps, random_batch, random_pairs, tiny_lm

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "cohere", "granite", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_whole_logits(family: str) -> None:
    pairs = random_pairs(4, seed=1)
    chosen, rejected = plain_logps(tiny_lm(family), pairs)
    scored = pair_logps(ResponseScorer(tiny_lm(family)), collate_padded(pairs, pad_token_id=0))
    torch.testing.assert_close(scored.chosen, chosen, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scored.rejected, rejected, rtol=1e-5, atol=1e-4)
    assert scored.chosen_tokens.tolist() == [len(pair.responses[0]) for pair in pairs]
    assert scored.rejected_tokens.tolist() == [len(pair.responses[1]) for pair in pairs]


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_gradients_equal_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_CPU", 4 * 97 * 5)  # chunks of 5 tokens
    pairs = random_pairs(3, seed=2)
    weights = torch.tensor([0.5, -2.0, 1.0])
    plain, ours = tiny_lm(family), tiny_lm(family)
    chosen, rejected = plain_logps(plain, pairs)
    ((chosen - 0.5 * rejected) * weights).sum().backward()
    scored = pair_logps(ResponseScorer(ours), collate_padded(pairs, pad_token_id=0))
    ((scored.chosen - 0.5 * scored.rejected) * weights).sum().backward()
    for (name, expected), (_, parameter) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        error = (parameter.grad - expected.grad).norm() / expected.grad.norm().clamp(min=1e-6)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_any_chunk_size_gives_the_same(chunk: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11)
    hidden, targets = torch.randn(7, 6, requires_grad=True), torch.randint(0, 11, (7,))
    expected = head(hidden).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    expected_grads = torch.autograd.grad((expected * torch.arange(7)).sum(), [hidden, head.weight, head.bias])
    head.__class__, head.transform = ChunkedHead, LogitTransform()
    ours = head(hidden, targets, chunk)
    grads = torch.autograd.grad((ours * torch.arange(7)).sum(), [hidden, head.weight, head.bias])
    torch.testing.assert_close(ours, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_long_responses_lose_nothing_in_the_sum() -> None:
    """A head of zeros gives every token the same log-prob; 3,000 of them, added in float32, lose half a nat."""
    lm = tiny_lm(hidden_size=8, head_dim=2, max_position_embeddings=4096)
    torch.nn.init.zeros_(lm.get_output_embeddings().weight)
    tokens = np.arange(3000) % 90 + 3
    pair = Group.of(0, tokens[:1], tokens, tokens[:1000])
    scored = pair_logps(ResponseScorer(lm), collate_padded([pair], pad_token_id=0))
    token = torch.zeros(97).log_softmax(-1)[:1]
    for found, count in ((scored.chosen, 3000), (scored.rejected, 1000)):
        exact = count * token.double()
        torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=0)
        in_float32 = torch.zeros(1).index_add(0, torch.zeros(count, dtype=torch.int64), token.expand(count))
        assert (in_float32 - exact).abs() > 5e-7 * exact.abs(), "nothing is lost with so few tokens"


def test_a_frozen_head_gets_no_weight_gradient() -> None:
    scorer = ResponseScorer(tiny_lm())
    scorer.lm.get_output_embeddings().requires_grad_(False)
    pair_logps(scorer, random_batch()).chosen.sum().backward()
    assert scorer.lm.get_output_embeddings().weight.grad is None
    assert scorer.lm.model.layers[0].mlp.up_proj.weight.grad is not None


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements with the vocabulary as a dimension that any operation returns."""

    def __init__(self, vocab: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.vocab, self.dtype, self.elements = vocab, dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and self.vocab in tensor.shape and self.dtype in (None, tensor.dtype):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_never_a_whole_matrix_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, hidden = 1009, 8
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_CPU", 4 * vocab * 10)  # chunks of 10 tokens
    scorer = ResponseScorer(tiny_lm(vocab_size=vocab, hidden_size=hidden, head_dim=2))
    batch = random_batch(8, longest=40)
    assert len(batch.targets) > 150
    with LargestTensor(vocab) as seen:
        pair_logps(scorer, batch).chosen.sum().backward()
    assert vocab * 8 <= seen.elements <= vocab * 10


def test_generation_still_works_through_the_swapped_head() -> None:
    lm = tiny_lm()
    ids = torch.tensor([[1, 5, 9]])
    expected = lm(input_ids=ids).logits
    ResponseScorer(lm)
    torch.testing.assert_close(lm(input_ids=ids).logits, expected)


def test_an_unknown_head_is_refused() -> None:
    lm = tiny_lm()
    lm.lm_head = torch.nn.Sequential(lm.lm_head)
    with pytest.raises(ConfigError, match="output head of LlamaForCausalLM is a Sequential"):
        ResponseScorer(lm)


def test_pairs_are_joined_cut_and_picked_in_all_columns() -> None:
    logps = PairLogps(*torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]), *torch.tensor([[1, 2, 3], [4, 5, 6]]))
    one, two = logps.split([1, 2])
    assert (len(one), len(two)) == (1, 2)
    assert two.rejected.tolist() == [-5.0, -6.0]
    assert two.chosen_tokens.tolist() == [2, 3]
    again = PairLogps.cat([two, one])
    assert again.chosen.tolist() == [-2.0, -3.0, -1.0]
    back = again.take(torch.tensor([2, 0, 1]))
    for name, column in PairLogps.from_numpy(back.numpy()).columns().items():
        assert column.equal(logps.columns()[name]), name
        assert column.dtype == logps.columns()[name].dtype
    table = PairLogps.zeros(4)
    table.put(torch.tensor([3, 1]), two)
    assert table.rejected_tokens.tolist() == [0, 6, 0, 5]
    assert table.take(np.array([False, True, False, True])).chosen.tolist() == [-3.0, -2.0]


def test_head_under_autocast_is_as_exact_as_autograd() -> None:
    """Against float32, the gradient of chunked log-probs is no further off than autograd's under the same autocast."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator)
    linear = torch.nn.Linear(32, 500, bias=False)
    with torch.no_grad():
        linear.weight.copy_(3.5 * torch.randn(500, 32, generator=generator))
    targets = torch.randint(500, (64,), generator=generator)

    def gradient(chunked: bool, autocast: bool) -> torch.Tensor:
        linear.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if chunked:
                logps = module._ChunkedLogp.apply(hidden, linear.weight, None, targets, LogitTransform(), 16, ())
            else:
                logps = linear(hidden).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        logps.sum().backward()
        return linear.weight.grad.clone()

    exact = gradient(chunked=False, autocast=False)
    own, autograd = (float((gradient(chunked, True) - exact).norm() / exact.norm()) for chunked in (True, False))
    assert own <= 1.1 * autograd
    assert autograd > 1e-3, "no rounding here to compare"


def test_no_float32_gradient_of_a_whole_16_bit_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums are made a block of the vocabulary at a time, and are those of the whole."""
    vocab, width = 500, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, width, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).bfloat16().requires_grad_()
    bias = torch.randn(vocab, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (64,), generator=generator)
    transform = LogitTransform(scale=0.5, softcap=3.0)

    def gradients() -> tuple[list[torch.Tensor], int]:
        logps = module._ChunkedLogp.apply(hidden, weight, bias, targets, transform, 16, ())
        with LargestTensor(width, torch.float32) as seen:
            found = torch.autograd.grad(logps.sum(), [hidden, weight, bias])
        return [part.float() for part in found], seen.elements

    whole, size = gradients()
    assert size == vocab * width
    monkeypatch.setattr(module, "SUM_BYTES", 4 * width * 150)
    blocks, size = gradients()
    assert size == 150 * width
    for part, expected in zip(blocks, whole, strict=True):
        assert (part - expected).norm() < 3e-3 * expected.norm()
