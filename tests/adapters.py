"""Adapters to go on with, for tests: every part random, so that it differs from the base model; and their bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def continued_adapter(folder: Path, inputs: Path, *, seed: int = 1, **fields: Any) -> str:
    """An adapter folder for the demo model (see `tests.runs.demo_inputs`); `fields` are peft.LoraConfig's."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_pretrained(inputs / "model")
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields}
    wrapped = peft.get_peft_model(lm, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                # A magnitude (DoRA) or a whole module is scaled, a factor drawn anew.
                factor = "lora_A" in name or "lora_B" in name
                parameter.copy_(torch.randn_like(parameter) * 0.1 if factor else parameter * 1.1)
    path = folder / f"adapter-{seed}"
    wrapped.save_pretrained(str(path))
    return str(path)


def merged(folder: Path, inputs: Path, adapter: str) -> str:
    """The demo model with an adapter merged into it by peft, as a model folder."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(inputs / "model")
    peft.PeftModel.from_pretrained(lm, adapter).merge_and_unload().save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(str(folder))
    return str(folder)


def dequantized(folder: Path, path: Path, *, dtype: str = "float32") -> str:
    """The model whose weights are what the 4 bits of the one in `path` stand for, as a model folder."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsdpo.config.model import ModelConfig
    from dsdpo.engine.load import DTYPES
    from dsdpo.engine.quantization import is_quantized, loading_options

    model = ModelConfig.model_validate({"path": str(path), "dtype": dtype, "lora": {}, "quantization": {"bits": 4}})
    low = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], **loading_options(model))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
    targets, changed = dict(plain.named_parameters()), 0
    with torch.no_grad():
        for name, parameter in low.named_parameters():
            if is_quantized(parameter):
                targets[name].copy_(dequantize_4bit(parameter.data, parameter.quant_state))
                changed += 1
    assert changed == 7 * plain.config.num_hidden_layers
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return str(folder)
