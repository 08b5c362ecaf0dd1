"""Loads of a mixture of experts and their loss: transformers' own values, each real token once, in every batching."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as qwen_loss

from dsdpo.data.batch import PreferenceBatch, filler
from dsdpo.data.binning import LayoutName
from dsdpo.data.collate import collate, merge
from dsdpo.data.pairs import Group
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import ResponseScorer
from dsdpo.objective.router import Routing, describe_loads, pull, routing_of
from tests.tiny import random_pairs, tiny_lm

FAMILIES = {"mixtral": mixtral_loss, "qwen3_moe": qwen_loss}
EXPERTS = 4
ROUTING = Routing(top_k=2, coefficient=1.0)


def sharing_pairs() -> list[Group]:
    """Pairs of random tokens; the responses of the first begin alike."""
    first, *others = random_pairs(5)
    responses = tuple(torch.cat([torch.tensor([7, 8, 9]), torch.tensor(part)]).numpy() for part in first.responses)
    return [replace(first, responses=responses), *others]


def batch_of(groups: list[Group], layout: LayoutName) -> PreferenceBatch:
    batch = collate(groups, layout=layout, pad_token_id=0)
    return batch


def loads_of(scorer: ResponseScorer, batch: PreferenceBatch) -> Tensor:
    return scorer(batch=batch, routing=ROUTING)[1]


def scorer_of(family: str, layout: LayoutName) -> ResponseScorer:
    lm = tiny_lm(family, scale=3.0)
    lm.set_attn_implementation("dsdpo" if layout == "packed" else "sdpa")
    return ResponseScorer(lm)


def gradient(scorer: ResponseScorer, loss: Tensor) -> Tensor:
    scorer.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_value_and_gradient_are_transformers_own(family: str, layout: LayoutName) -> None:
    groups = sharing_pairs()
    padded, lm = batch_of(groups, "padded"), tiny_lm(family, scale=3.0)
    own = lm(input_ids=padded.input_ids, attention_mask=padded.attention.attention_mask, output_router_logits=True)
    expected = FAMILIES[family](own.router_logits, EXPERTS, 2, padded.counted)
    wanted = gradient(lm, expected)

    scorer = scorer_of(family, layout)
    loads = loads_of(scorer, batch_of(groups, layout))
    found = (pull(loads[0], ROUTING) * loads[1]).sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(scorer, found), wanted, rtol=1e-4, atol=1e-7)
    assert wanted.norm() > 1e-4
    assert describe_loads(*loads.tolist(), top_k=2)["router/aux_loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_each_token_counts_once_and_no_filler(layout: LayoutName) -> None:
    groups, scorer = sharing_pairs(), scorer_of("mixtral", layout)
    batch = batch_of(groups, layout)
    # Prompt and both responses without their last tokens; the first pair's responses have three tokens in common.
    tokens = sum(len(g.prompt) + len(g.responses[0]) - 1 + len(g.responses[1]) - 1 for g in groups) - 3
    layers = 2
    assert batch.counted is not None
    assert int(batch.counted.sum()) == tokens
    assert loads_of(scorer, batch).sum(1).tolist() == pytest.approx([2 * layers * tokens, layers * tokens])
    assert loads_of(scorer, filler(batch)).sum() == 0
    parts = [batch_of(groups[:2], layout), batch_of(groups[2:], layout), filler(batch_of(groups[3:], layout))]
    apart = torch.stack([loads_of(scorer, part) for part in parts]).sum(0)
    torch.testing.assert_close(apart, loads_of(scorer, batch), rtol=1e-5, atol=0)
    torch.testing.assert_close(apart, loads_of(scorer, merge(parts)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_borrowed_response_does_not_count(layout: LayoutName) -> None:
    """What KTO puts behind another prompt is no text of the data."""
    rated = [replace(group, scores=(1.0,)) for group in random_pairs(3)]
    counted = batch_of(rated, layout).counted
    assert counted is not None
    assert int(counted.sum()) == sum(len(group.prompt) + len(group.responses[0]) - 1 for group in rated)


def test_the_gradient_of_a_step_is_that_of_its_batches() -> None:
    groups, scorer = sharing_pairs(), scorer_of("qwen3_moe", "packed")
    whole = loads_of(scorer, batch_of(groups, "packed"))
    expected = gradient(scorer, (pull(whole[0], ROUTING) * whole[1]).sum())
    parts = [loads_of(scorer, batch_of(part, "packed")) for part in (groups[:1], groups[1:])]
    chosen = sum(part[0].detach() for part in parts)
    found = gradient(scorer, sum((pull(chosen, ROUTING) * part[1]).sum() for part in parts))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_what_is_asked_follows_from_setting_and_model() -> None:
    mixtral = MixtralConfig(router_aux_loss_coef=0.02)
    ask: Any = lambda given: routing_of(MixtralForCausalLM, mixtral, given)  # noqa: E731
    assert ask(None) == Routing(2, 0.02)
    assert ask(0.0) == Routing(2, 0.0)
    assert ask(0.5) == Routing(2, 0.5)
    dense = LlamaConfig()
    assert routing_of(LlamaForCausalLM, dense, None) is routing_of(LlamaForCausalLM, dense, 0.0) is None
    with pytest.raises(ConfigError, match=r"model.router_aux_loss_coef 0.1 has no effect: llama is no mixture"):
        routing_of(LlamaForCausalLM, dense, 0.1)


def test_loads_in_words() -> None:
    # 8 tokens of top 1: 4, 2, 2 and 0 of them; even would be 2 each.
    said = describe_loads([4, 2, 2, 0], [3.2, 2.0, 1.6, 1.2], top_k=1)
    assert said["router/load_max"] == 2.0
    assert said["router/load_min"] == 0.0
    assert said["router/unused"] == 0.25
    # 4 · (0.5 · 0.4 + 0.25 · 0.25 + 0.25 · 0.2)
    assert said["router/aux_loss"] == pytest.approx(4 * (0.2 + 0.0625 + 0.05))
