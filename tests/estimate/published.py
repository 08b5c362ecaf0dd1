"""Settings of other trainers whose memory is published, as far as dsdpo can be given them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from dsdpo.config.run import RunConfig
from dsdpo.data.binning import LayoutName
from dsdpo.estimate.forecast import Forecast
from dsdpo.estimate.hardware import hardware
from dsdpo.estimate.seconds import Machine
from dsdpo.run.estimate import forecast_of, with_models
from dsdpo.run.plan import Layout

CPU = {"device": "cpu", "pin_memory": True}
STAGE2, STAGE3 = {"stage": 2}, {"stage": 3}
OPTIMIZER_ON_HOST = {"stage": 3, "offload_optimizer": CPU}
ALL_ON_HOST = {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}
AUTO = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
SFT = {"loss": {"type": "sft"}, "reference": {"strategy": "none"}}
LONG_SFT = {**SFT, "model": {"mlp_tile_tokens": 32_768, "activation_offloading": True, "use_liger_kernel": True}}
LORA = {"model": {"lora": {"r": 8, "target_modules": "all-linear"}}}


def qwen2(hidden: int, inner: int, layers: int, heads: int, kv: int, *, tied: bool = False) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=151_936 if tied else 152_064,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    )


def llama(hidden: int, inner: int, layers: int, heads: int) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )


MODELS = {
    "Qwen2.5-3B": qwen2(2048, 11_008, 36, 16, 2, tied=True),
    "Qwen2.5-7B": qwen2(3584, 18_944, 28, 28, 4),
    "Qwen2.5-14B": qwen2(5120, 13_824, 48, 40, 8),
    "Qwen2.5-72B": qwen2(8192, 29_568, 80, 64, 8),
    "Llama 3.1 8B": llama(4096, 14_336, 32, 32),
    "Llama 3.1 70B": llama(8192, 28_672, 80, 64),
    "Mistral 7B": MistralConfig(
        vocab_size=32_000, sliding_window=None, num_key_value_heads=8, architectures=["MistralForCausalLM"]
    ),
    "Qwen3-14B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        architectures=["Qwen3ForCausalLM"],
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        architectures=["Qwen3MoeForCausalLM"],
    ),
}


@dataclass(frozen=True)
class Setting:
    """One published run, as dsdpo would make it."""

    model: str
    tokens: tuple[int, ...]  # of prompt and responses
    ranks: int
    zero: dict[str, Any]
    gpu: str = "a100"
    pairs: int = 1  # of a micro-batch
    sharing: int = 1  # ranks to a row
    layout: LayoutName = "packed"
    optimizer: str = "adamw"
    sections: dict[str, Any] = field(default_factory=dict)


K = 1000
SETTINGS = {
    "Muon's blog, AdamW": Setting(
        "Qwen2.5-3B", (1, 2047), 8, STAGE2, "a100-40gb", pairs=4, layout="padded", sections=SFT
    ),
    "Muon's blog, Muon": Setting(
        "Qwen2.5-3B", (1, 2047), 8, STAGE2, "a100-40gb", pairs=4, layout="padded", optimizer="muon", sections=SFT
    ),
    "ms-swift 7B, padding-free": Setting("Qwen2.5-7B", (100, 400, 400), 4, STAGE3, pairs=4),
    "ms-swift 7B, padded": Setting("Qwen2.5-7B", (100, 400, 400), 4, STAGE3, pairs=4, layout="padded"),
    "ms-swift VL-7B, padding-free": Setting("Qwen2.5-7B", (700, 80, 80), 4, STAGE3, pairs=4),
    "ms-swift 30B-A3B, LoRA": Setting("Qwen3-30B-A3B", (400, 600, 600), 2, STAGE3, pairs=8, sections=LORA),
    "ms-swift 30B-A3B, all weights": Setting("Qwen3-30B-A3B", (400, 3896, 3896), 8, OPTIMIZER_ON_HOST),
    "360-LLaMA-Factory 7B, 84k": Setting("Qwen2.5-7B", (K, 83 * K, 83 * K), 8, ALL_ON_HOST, "a800", sharing=4),
    "360-LLaMA-Factory 14B, 72k": Setting("Qwen2.5-14B", (K, 71 * K, 71 * K), 8, ALL_ON_HOST, "a800", sharing=8),
    "360-LLaMA-Factory 72B, 86k": Setting("Qwen2.5-72B", (K, 85 * K, 85 * K), 32, ALL_ON_HOST, "a800", sharing=16),
    "LongPO Mistral 7B, 8 to a row": Setting("Mistral 7B", (127 * K, K, K), 8, STAGE3, sharing=8),
    "LongPO Mistral 7B, 4 to a row": Setting("Mistral 7B", (127 * K, K, K), 8, STAGE3, sharing=4),
    "LongPO Qwen2.5-7B": Setting("Qwen2.5-7B", (127 * K, K, K), 14, STAGE3, sharing=14),
    "ALST 32k": Setting("Llama 3.1 8B", (1, 32 * K - 1), 8, OPTIMIZER_ON_HOST, "h100", sections=SFT),
    "ALST 500k": Setting("Llama 3.1 8B", (1, 500 * K - 1), 1, ALL_ON_HOST, "h100", sections=LONG_SFT),
    "ALST 3.7M": Setting("Llama 3.1 8B", (1, 3700 * K - 1), 8, OPTIMIZER_ON_HOST, "h100", sharing=8, sections=LONG_SFT),
    "ALST 15M": Setting(
        "Llama 3.1 8B", (1, 15_000 * K - 1), 32, OPTIMIZER_ON_HOST, "h100", sharing=32, sections=LONG_SFT
    ),
    "SuperOffload": Setting("Qwen3-14B", (1, 4095), 1, ALL_ON_HOST, "gh200", sections=SFT),
    "Tülu 3 8B": Setting(
        "Llama 3.1 8B", (512, 1536, 1536), 8, STAGE3, "h100", sections={"reference": {"strategy": "precomputed"}}
    ),
    "Tülu 3 70B": Setting(
        "Llama 3.1 70B", (512, 1536, 1536), 64, STAGE3, "h100", sections={"reference": {"strategy": "precomputed"}}
    ),
}  # fmt: skip


def forecast(setting: Setting, folder: Path) -> Forecast:
    """What `dsdpo estimate` says of it, on nodes of 8."""
    config = MODELS[setting.model]
    config.save_pretrained(folder)
    zero = {**setting.zero, **(dict.fromkeys(AUTO, "auto") if setting.zero["stage"] == 3 else {})}
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    run: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"train": "nowhere.jsonl", "max_length": 16_000_000},
        "optimizer": {"type": setting.optimizer, **({"max_grad_norm": 0.0} if setting.optimizer == "muon" else {})},
        "batch": {"pairs_per_micro_batch": setting.pairs},
        "distributed": {"sequence_parallel": setting.sharing},
        "deepspeed": str(folder / "zero.json"),
        "output_dir": str(folder / "run"),
    }
    if "reference" not in setting.sections:
        run["reference"] = {"score_tokens": 1024}
    for name, values in setting.sections.items():
        run[name] = {**run.get(name, {}), **values}
    subject = with_models(
        RunConfig.model_validate(run),
        "run.yaml",
        lengths=np.array([setting.tokens]),
        layout=Layout(setting.layout),
        hidden_size=config.hidden_size,
    )
    per_node = min(8, setting.ranks)
    return forecast_of(subject, Machine(hardware(setting.gpu, ranks_per_node=per_node), setting.ranks, per_node))
