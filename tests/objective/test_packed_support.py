"""Which models get the packed layout, and the reason that a user reads where one does not."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from dsdpo.objective.packed_support import packed_refusal

FIT = [
    *("cohere2", "deepseek_v3", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama"),
    *("mistral", "mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
]
UNFIT = [
    ("bloom", {}, "bloom does not call its attention through transformers' interface"),
    ("falcon", {}, "interface"),
    ("mpt", {}, "several models"),
    ("mamba2", {}, "interface"),
    ("bamba", {}, "interface"),
    ("falcon_h1", {}, "interface"),
    ("qwen3_next", {}, "interface"),
    ("lfm2", {}, "a convolution over tokens"),
    ("minimax", {}, "a recurrent state"),
    ("recurrent_gemma", {}, "a convolution over tokens"),
    ("llama4_text", {}, "chunked attention"),
    ("doge", {}, "attention masks of its own"),
    ("deepseek_v32", {}, "sparse attention"),
    ("nemotron", {}, "NemotronDecoderLayer does not hand keyword arguments on"),
    ("phimoe", {"sliding_window": 64}, "does not tell its attention of its sliding window"),
    ("gemma3", {}, "several models"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("qwen2", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "layers of type chunked_attention"),
]


@pytest.mark.parametrize("family", FIT)
def test_known_families_are_packed(family: str) -> None:
    assert packed_refusal(CONFIG_MAPPING[family]()) is None


@pytest.mark.parametrize(
    ("family", "settings", "reason"), UNFIT, ids=[f"{name}-{text[:12]}" for name, _, text in UNFIT]
)
def test_others_are_refused_with_a_reason(family: str, settings: dict[str, Any], reason: str) -> None:
    assert reason in str(packed_refusal(CONFIG_MAPPING[family](**settings)))


def test_code_of_a_models_own_is_refused() -> None:
    class OwnConfig(PretrainedConfig):
        model_type = "own"

    assert packed_refusal(OwnConfig()) == "own is not a causal language model of transformers' own"


@pytest.mark.parametrize(
    ("name", "fits"), [("auto", True), ("sdpa", True), ("flash_attention_2", True), ("eager", False)]
)
def test_attention_asked_for(name: str, fits: bool) -> None:
    assert (packed_refusal(CONFIG_MAPPING["llama"](), name) is None) == fits
