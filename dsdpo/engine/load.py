"""Causal language models as an engine takes them: loaded whole or into shards, with nothing random in them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dsdpo.config.model import ModelConfig
from dsdpo.data.binning import LayoutName
from dsdpo.engine.blank import attention_name, key_mapping, quiet_loading, refuse_unfit
from dsdpo.engine.compiled_layers import compile_layers
from dsdpo.engine.kernels import refuse_kernels, use_liger
from dsdpo.engine.quantization import keep_packed, loading_options
from dsdpo.engine.quirks.sharded_loading import loading_own_shards
from dsdpo.engine.rope import fix_rope_factors
from dsdpo.engine.zero_config import stage
from dsdpo.errors import ConfigError
from dsdpo.objective.eight_bits import multiply_in_fp8
from dsdpo.objective.tiles import compute_in_tiles, mlps_of

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Numbers of modules and configurations by which a model is another function in each training pass.
RANDOM = (
    *("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "resid_dropout", "attn_dropout"),
    *("residual_dropout", "resid_attn_dropout", "resid_mlp_dropout", "embed_dropout", "embedding_dropout"),
    *("attn_dropout_p", "dropout_rate", "attn_pdrop", "resid_pdrop", "embd_pdrop", "emb_pdrop", "ffn_dropout"),
    *("layerdrop", "drop_path_rate", "drop_prob", "noise_std"),
    *("jitter_noise", "input_jitter_noise", "router_jitter_noise", "moe_jitter_eps", "router_noise_epsilon"),
)


def load_lm(
    model: ModelConfig,
    config: dict[str, Any],
    *,
    layout: LayoutName,
    longest: int | None = None,
    like: nn.Module | None = None,
) -> Any:
    """The causal language model, under stage 3 straight into shards, with nothing random in it. Collective.

    `longest` is the run's longest pair in tokens, by which the factors of position embeddings that depend on it are
    fixed. `like` is a model that holds the same weights, from which shards are copied. Raises `ConfigError` if the
    weights do not fill the model.
    """
    bits = None if model.quantization is None else model.quantization.bits
    in_shards = stage(config) == 3 and bits != 4
    by_parts = loading_own_shards(like=like) if in_shards else nullcontext()
    started = time.monotonic()
    with partitioned_loading(config), by_parts, quiet_loading():
        try:
            lm, found = AutoModelForCausalLM.from_pretrained(
                model.path,
                revision=model.revision,
                dtype=DTYPES[model.dtype],
                attn_implementation=attention_name(model, layout),
                trust_remote_code=model.trust_remote_code,
                use_safetensors=None if model.allow_pickle else True,
                key_mapping=key_mapping(model),
                output_loading_info=True,
                **loading_options(model),
            )
        except (RuntimeError, ValueError, OSError, ImportError, SafetensorError) as error:
            first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(f"the weights of {model.path} cannot be loaded: {first_line}") from error
    log.info("%s: %.2f s", f"weights of {model.path}", time.monotonic() - started)
    refuse_unfit(found, {}, f"the weights of {model.path} do not fill the model", what=type(lm).__name__)
    switch_off_randomness(lm)
    keep_packed(lm)
    if bits == 8:
        multiply_in_fp8(lm)
    if longest is not None:
        fix_rope_factors(lm, longest)
    mark_moe_leaves(lm)
    if model.use_liger_kernel:
        use_liger(lm)
    if model.mlp_tile_tokens is not None:
        tile_mlps(lm, model.mlp_tile_tokens)
    if model.torch_compile:
        compile_layers(lm)
    return lm


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Make Hugging Face load for exactly this DeepSpeed config.

    Its switch is a process-wide weak reference of which the last object alive wins, so each load brings its own and
    takes it away again: a stage-2 policy beside a stage-3 reference would otherwise be loaded partitioned.
    """
    live = HfDeepSpeedConfig(config) if stage(config) == 3 else unset_hf_deepspeed_config()
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del live


def switch_off_randomness(lm: nn.Module) -> None:
    """Set every dropout, layer drop and noise to zero: policy and reference must be the same function at step 0.

    Router noise in particular is multiplied into hidden states in place, on which ZeRO-3's backward pass stops.
    """
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in RANDOM:
            if isinstance(value := getattr(module, name, None), (int, float)) and not isinstance(value, bool):
                setattr(module, name, 0.0)


def mark_moe_leaves(lm: nn.Module) -> None:
    """Have ZeRO-3 gather each mixture-of-experts block whole.

    Ranks route tokens to different experts; gathering expert by expert would leave them in different collectives.
    """
    blocks = {type(module) for module in lm.modules() if "experts" in dict(module.named_children())}
    if blocks:
        deepspeed.utils.set_z3_leaf_modules(lm, list(blocks))


def tile_mlps(lm: nn.Module, tokens: int) -> None:
    """Compute the layers' MLPs `tokens` tokens at a time.

    ZeRO-3 gathers each MLP whole, once for all its tiles: ranks whose rows differ in length have other numbers of them.
    """
    for mlp in mlps_of(lm):
        compute_in_tiles(mlp, tokens)
        deepspeed.utils.set_z3_leaf_module(mlp, True)


def refuse_on_device(model: ModelConfig) -> None:
    """Raise `ConfigError` if the device of this rank cannot compute as the model's settings ask."""
    accelerator = get_accelerator()
    if model.attn_implementation == "flex_attention" and accelerator.device_name() == "cpu":
        raise ConfigError(
            "model.attn_implementation: flex_attention has no backward pass on a CPU; set it to sdpa, or to auto"
        )
    if model.dtype == "float16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"model.dtype: float16 does not run on {accelerator.device_name()} devices; set it to bfloat16 or float32"
        )
    refuse_kernels(model, accelerator.device_name())
