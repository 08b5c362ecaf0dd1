"""What models do around their output head, found from their own code; a dozen types stand for the whole survey."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsdpo.data.batch import collate_padded
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import ResponseScorer, pair_logps
from dsdpo.objective.output_head import LogitTransform, logit_transform
from tests.survey_models import survey
from tests.tiny import plain_logps, random_batch, random_pairs, tiny_lm

# Scales and caps of every kind, mixtures of experts, recurrent models, heads with a bias.
DOZEN = [
    *("cohere", "gemma2", "granite", "hyperclovax", "falcon_h1", "recurrent_gemma"),
    *("bloom", "phi", "gpt_oss", "deepseek_v3", "llama4_text", "mamba2"),
]


@pytest.mark.parametrize("family", DOZEN)
def test_own_logits_at_unusual_scales(family: str) -> None:
    [finding] = survey([family])
    assert finding.outcome == "right", finding


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, LogitTransform()),
        ("cohere", {"logit_scale": 0.3}, LogitTransform(scale=0.3)),
        ("granite", {"logits_scaling": 3.0}, LogitTransform(scale=1 / 3)),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(softcap=30.0)),
        ("hyperclovax", {"logits_scaling": 0.125}, LogitTransform(scale=0.125)),
    ],
)
def test_numbers_are_those_of_the_configuration(family: str, changes: dict[str, Any], expected: LogitTransform) -> None:
    assert logit_transform(tiny_lm(family, **changes)) == expected


def test_masked_language_models_are_refused() -> None:
    [finding] = survey(["roberta"])
    assert finding.outcome == "refused", finding
    assert "more than one linear layer" in finding.note


def own_code(around: Any) -> Any:
    """A Llama whose class has this forward, as code that comes with a model may."""
    lm = tiny_lm()

    class OwnForCausalLM(type(lm)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, attention_mask: Any = None, **others: Any) -> Any:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
            answer = around(self, hidden)
            return type("Answer", (), {"logits": answer})()

    lm.__class__ = OwnForCausalLM
    return lm


def test_scales_in_code_of_a_models_own() -> None:
    """Hidden states divided before the head, as MiniCPM does, and fewer logits than embeddings."""
    pairs = random_pairs(3, seed=4, vocab=80)
    lm = own_code(lambda self, hidden: 7.0 * torch.tanh(self.lm_head(hidden / 2.5)[..., :80] * 0.4 / 7.0))
    lm.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 97))
    chosen, rejected = plain_logps(lm, pairs)
    scorer = ResponseScorer(lm)
    head = lm.get_output_embeddings()
    assert head.transform == LogitTransform(scale=0.4, softcap=7.0, hidden_scale=0.4, vocabulary=80)
    scored = pair_logps(scorer, collate_padded(pairs, pad_token_id=0))
    torch.testing.assert_close(scored.chosen, chosen, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scored.rejected, rejected, rtol=1e-5, atol=1e-4)
    weights = [head.weight, lm.model.layers[0].mlp.up_proj.weight]
    ours = torch.autograd.grad(scored.chosen.sum(), weights)
    for found, expected in zip(ours, torch.autograd.grad(chosen.sum(), weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (lambda self, hidden: self.lm_head(hidden).relu(), "changes its logits"),
        (lambda self, hidden: self.lm_head(hidden) - hidden.mean(-1, keepdim=True), "changes its logits"),
        (lambda self, hidden: self.lm_head(hidden.roll(1, 1)), "more than one linear layer"),
        (lambda self, hidden: self.lm_head(self.model.norm(hidden)), "more than one linear layer"),
        (lambda self, hidden: hidden @ self.lm_head.weight.t(), "more than one linear layer"),
    ],
)
def test_what_cannot_be_followed_is_refused(around: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"OwnForCausalLM .*{words}"):
        ResponseScorer(own_code(around))


def test_finding_the_logit_transform_changes_no_output() -> None:
    lm = tiny_lm("gemma2")
    ids = torch.tensor([[5, 6, 7]])
    before = lm(input_ids=ids).logits
    logit_transform(lm)
    torch.testing.assert_close(lm(input_ids=ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_own_logits_mode_is_the_models_own_answer(family: str) -> None:
    lm = tiny_lm(family)
    pairs = random_pairs(3, seed=9)
    expected = torch.cat(plain_logps(lm, pairs))
    scorer = ResponseScorer(lm)
    vars(lm.get_output_embeddings())["transform"] = LogitTransform(scale=5.0)  # which it must not ask
    own = scorer(collate_padded(pairs, pad_token_id=0), own_logits=True)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(scorer(random_batch(3, seed=9)), own, rtol=1e-2)
