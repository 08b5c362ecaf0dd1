"""Token weights and the other outputs of the head, against whole logits, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from dsdpo.config.loss import LossConfig
from dsdpo.data.batch import collate_padded
from dsdpo.data.collate import merge
from dsdpo.data.packed_layout import collate_packed
from dsdpo.data.pairs import Group
from dsdpo.objective import chunked_head as module
from dsdpo.objective.logps import ResponseScorer, pair_logps
from dsdpo.objective.scores import extras_of, policy_scores
from dsdpo.objective.token_weights import TokenWeights
from tests.tiny import random_pairs, tiny_lm


def whole_logits(lm: torch.nn.Module, group: Group, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax (C, V) at a response's tokens, and the tokens (C,)."""
    prompt, response = torch.tensor(group.prompt).long(), torch.tensor(group.responses[index]).long()
    logits = lm(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1), response


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_outputs_of_the_head_beside_log_probs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_CPU", 4 * 97 * 5)  # chunks of 5 tokens
    pairs = random_pairs(4, seed=3)
    lm = tiny_lm(family)
    likelihood, entropies = [], []
    with torch.no_grad():
        for pair in pairs:
            aligned = []
            for index in (0, 1):
                logps, tokens = whole_logits(lm, pair, index)
                own = logps.gather(-1, tokens[:, None]).squeeze(-1)
                aligned.append((own - (2 * logps).logsumexp(-1)).mean())
                entropies.append(-(logps.exp() * logps).sum(-1).mean())
            likelihood.append(torch.exp(aligned[0]) * torch.exp(aligned[1]))
    scorer, batch = ResponseScorer(tiny_lm(family)), collate_padded(pairs, pad_token_id=0)
    extras = extras_of(LossConfig(use_weighting=True), entropy=True)
    scored = policy_scores(scorer, batch, extras)
    assert scored.likelihood is not None
    assert scored.entropy is not None
    torch.testing.assert_close(scored.likelihood, torch.stack(likelihood), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored.entropy.T.flatten(), torch.stack(entropies), rtol=1e-4, atol=1e-4)
    assert not scored.likelihood.requires_grad
    plain = pair_logps(scorer, batch)
    torch.testing.assert_close(scored.logps.chosen, plain.chosen)
    # The gradient of log-probs does not know of the other outputs.
    grads = [torch.autograd.grad(scores.chosen.sum(), scorer.lm.lm_head.weight)[0] for scores in (scored.logps, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("weights", [TokenWeights(ld_alpha=0.3), TokenWeights(decay=0.9), TokenWeights(0.5, 0.8)])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_token_weights_by_place_in_the_response(weights: TokenWeights, layout: str) -> None:
    pairs = random_pairs(5, seed=4)
    lm = tiny_lm()
    expected = []
    with torch.no_grad():
        for pair in pairs:
            shortest = min(len(response) for response in pair.responses)
            for index in (0, 1):
                logps, tokens = whole_logits(lm, pair, index)
                own = logps.gather(-1, tokens[:, None]).squeeze(-1)
                by_hand = [
                    (weights.ld_alpha if weights.ld_alpha is not None and place >= shortest else 1.0)
                    * (weights.decay or 1.0) ** place
                    for place in range(len(own))
                ]
                expected.append(float((own * torch.tensor(by_hand)).sum()))
    lm = tiny_lm()
    if layout == "packed":
        lm.set_attn_implementation("dsdpo_sdpa")
    scorer = ResponseScorer(lm, token_weights=weights)
    parts = [
        collate_packed(part) if layout == "packed" else collate_padded(part, pad_token_id=0)
        for part in (pairs[:3], pairs[3:])
    ]
    with torch.no_grad():
        found = pair_logps(scorer, merge(parts))
    torch.testing.assert_close(
        torch.stack([found.chosen, found.rejected], 1).flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-4
    )
    plain = policy_scores(scorer, merge(parts), ("plain",)).chosen
    scorer.token_weights = None
    torch.testing.assert_close(plain, pair_logps(scorer, merge(parts)).chosen)
