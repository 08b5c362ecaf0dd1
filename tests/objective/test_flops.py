"""The counting formulas against torch's own counter on real models, and against pairs counted one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dsdpo.objective.flops import ModelFlops, Work, model_flops, pair_work, step_flops
from tests.tiny import SMALL

TOKENS = 24
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": MOE,
    "deepseek_v3": LATENT,
}


def model(family: str, **changes: Any) -> Any:
    """A small model whose operations torch can count: the fused ones of attention and experts it does not know."""
    config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES[family], **changes})
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if hasattr(lm, "set_experts_implementation") and "experts" in str(lm):
        lm.set_experts_implementation("eager")
    return lm


def counted(lm: Any, *, backward: bool) -> float:
    """torch's count of a pass over one sequence, all of whose tokens the head scores.

    Eager attention multiplies every query with every key, the later ones too.
    """
    ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        logits = lm(input_ids=ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def whole_sequence(lm: Any, **options: Any) -> tuple[Any, Work]:
    flops = model_flops(lm, **options)
    return flops, Work(TOKENS, dict.fromkeys(flops.attention, TOKENS**2), TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_are_torchs(family: str) -> None:
    lm = model(family)
    flops, work = whole_sequence(lm)
    assert flops.trunk == flops.trunk_trained
    assert flops.forward(work) == counted(lm, backward=False)
    assert flops.forward(work) + flops.backward(work) == counted(lm, backward=True)


def test_a_tied_head_counts_as_a_head() -> None:
    lm = model("llama", tie_word_embeddings=True)
    flops, work = whole_sequence(lm)
    assert flops.head == flops.head_trained == 97 * 32
    assert flops.forward(work) + flops.backward(work) == counted(lm, backward=True)


def test_an_adapter_adds_its_own_and_saves_the_frozen_gradients() -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    plain = model("llama")
    base = model_flops(plain)
    lm = peft.get_peft_model(plain, config)
    lm.add_adapter("reference", config)  # takes no part
    flops, work = whole_sequence(lm, adapter="default")
    assert flops.trunk_trained == flops.trunk - base.trunk
    assert flops.head == flops.head_trained == base.head
    assert flops.forward(work) == counted(lm, backward=False)
    # torch leaves out what leads to no parameter that trains: in the first layer, the gradient of the input through
    # the frozen and the trained inputs of q, k and v.
    unneeded = 2 * TOKENS * (32 * (32 + 16 + 16) + 3 * 4 * 32)
    assert flops.forward(work) + flops.backward(work) - unneeded == counted(lm, backward=True)
    without, work = whole_sequence(lm, adapter=None)
    with lm.disable_adapter():
        assert without.forward(work) == base.forward(work) == counted(lm, backward=False)


@pytest.mark.parametrize("window", [None, 3, 6])
def test_pairs_are_counted_as_a_mask_has_them(window: int | None) -> None:
    """The prompt stands once; each response sees it and itself, without its last token."""
    pairs = np.array([[5, 3, 4], [1, 1, 1], [2, 7, 1]], dtype=np.int32)
    tokens = attended = 0
    for prompt, chosen, rejected in pairs.tolist():
        queries = {("prompt", place) for place in range(prompt)}
        queries |= {("chosen", place) for place in range(prompt, prompt + chosen - 1)}
        queries |= {("rejected", place) for place in range(prompt, prompt + rejected - 1)}
        tokens += len(queries)
        for side, place in queries:
            seen = [(s, p) for s, p in queries if p <= place and s in ("prompt", side)]
            attended += sum(1 for _, p in seen if window is None or place - p < window)
    work = pair_work(pairs, (window,))
    assert (work.tokens, work.attended, work.scored) == (tokens, {window: attended}, pairs[:, 1:].sum())


def test_a_step_of_known_size() -> None:
    """By hand for one layer of width 1 and a head of 10: prompt 2, responses 2 and 1.

    Tokens 2 + 1 + 0, attended 3 + 3 = 6, scored 3. Forward 2 * 5 * 3 + 4 * 6 + 2 * 10 * 3 = 114; backward twice that;
    the reference, with the same model, once more.
    """
    layer = ModelFlops(trunk=5, trunk_trained=5, head=10, head_trained=10, attention={None: 1.0})
    lengths = np.array([[2, 2, 1]])
    assert step_flops(lengths, layer, None) == 3 * 114
    assert step_flops(lengths, layer, layer) == 4 * 114
