"""Tiny random models of real families, and batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dsdpo.data.batch import PreferenceBatch, collate_padded
from dsdpo.data.pairs import Group

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma3_text": {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "phi3": {},
    "hyperclovax": {"logits_scaling": 0.125},
}


def tiny_lm(family: str = "llama", *, seed: int = 0, scale: float = 5.0, **changes: Any) -> Any:
    """A random causal LM; weights are scaled up so that its log-probs are far from uniform."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SMALL, **FAMILY_EXTRAS[family], **changes})
    lm = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return lm.eval()


def random_pairs(count: int, *, seed: int = 0, vocab: int = 97, longest: int = 20) -> list[Group]:
    """Pairs of random tokens (ids from 3 on) with prompts and responses of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        return rng.integers(3, vocab, size=rng.integers(1, longest + 1))

    return [Group.of(index, tokens(), tokens(), tokens()) for index in range(count)]


def random_batch(count: int = 3, **options: Any) -> PreferenceBatch:
    """A padded batch of `random_pairs`."""
    return collate_padded(random_pairs(count, **options), pad_token_id=0)


def plain_logps(lm: Any, pairs: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """The independent truth: one sequence at a time, whole logits, log_softmax. Chosen (B,), rejected (B,)."""

    def one(prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([prompt, response])).long()[None]
        logps = lm(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return logps[len(prompt) - 1 :].gather(-1, ids[0, len(prompt) :, None]).sum()

    return (
        torch.stack([one(pair.prompt, pair.responses[0]) for pair in pairs]),
        torch.stack([one(pair.prompt, pair.responses[1]) for pair in pairs]),
    )
