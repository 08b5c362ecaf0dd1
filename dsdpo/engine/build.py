"""The two engines: a policy that trains and a reference that only answers, each under its own DeepSpeed config."""

from __future__ import annotations

import io
import logging
import re
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import get_scheduler

from dsdpo.config.model import ModelConfig
from dsdpo.config.run import OptimizerConfig, RunConfig
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.binning import LayoutName
from dsdpo.distributed import rank
from dsdpo.engine.load import load_lm, partitioned_loading
from dsdpo.engine.lora import add_adapter, add_reference_adapter
from dsdpo.engine.quirks.gather_trace import count_gathers_of
from dsdpo.engine.start import start_distributed as start_distributed
from dsdpo.engine.zero_config import offload_device
from dsdpo.objective.logps import ResponseScorer
from dsdpo.objective.token_weights import TokenWeights
from dsdpo.sequence_group import SequenceGroup

log = logging.getLogger(__name__)


def device() -> torch.device:
    """The device this rank computes on (ZeRO-3 shards may lie elsewhere)."""
    return torch.device(get_accelerator().current_device_name())


def build_policy(
    run: RunConfig,
    config: dict[str, Any],
    *,
    total_steps: int,
    layout: LayoutName,
    second_adapter: bool = False,
    longest: int | None = None,
    sequence: SequenceGroup | None = None,
) -> deepspeed.DeepSpeedEngine:
    """The training engine around a `ResponseScorer`, with a `second_adapter` for the reference if asked. Collective.

    Its packed rows are split over the ranks of `sequence`.

    The optimizer is the JSON's own if it has one; else DeepSpeed's CPU Adam when optimizer states are offloaded, and
    torch's AdamW (fused where the device has it) when they are not.
    """
    lm = load_lm(run.model, config, layout=layout, longest=longest)
    if run.model.gradient_checkpointing:
        # Reentrant checkpointing fails under ZeRO-2/3 when one backward covers two forwards, and with an adapter it
        # would need inputs that require gradients.
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if run.model.lora is not None:
        with partitioned_loading(config):  # by which peft knows that a base weight is to be gathered before it is read
            lm = add_adapter(lm, run.model, seed=run.train.seed)
            if second_adapter:
                add_reference_adapter(lm)
        # From here on only LoRA dropout draws at random: not the same mask on every rank.
        torch.manual_seed(run.train.seed + rank())
    model = ResponseScorer(
        lm,
        activations_on_host=run.model.activation_offloading,
        token_weights=TokenWeights.of(run.loss),
        sequence=sequence,
    )
    groups = parameter_groups(model, run.optimizer.weight_decay)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        warmup = run.optimizer.num_warmup_steps(total_steps)
        return get_scheduler(run.optimizer.lr_scheduler_type, optimizer, warmup, total_steps)

    engine = initialize(
        model=model,
        config=config,
        model_parameters=groups,
        optimizer=None if "optimizer" in config else make_optimizer(groups, run.optimizer, config),
        lr_scheduler=None if "scheduler" in config else schedule,
    )
    engine.train()
    return engine


def build_reference(
    model: ModelConfig,
    config: dict[str, Any],
    *,
    layout: LayoutName,
    token_weights: TokenWeights | None = None,
    longest: int | None = None,
    sequence: SequenceGroup | None = None,
    like: nn.Module | None = None,
) -> deepspeed.DeepSpeedEngine:
    """An inference-only engine (no optimizer, no gradients) around a frozen `ResponseScorer`. Collective.

    `like` is a model that holds the same weights, from which shards are copied.

    Never call `backward`, `step` or `save_checkpoint` on the result: without an optimizer they fail or hang
    (DeepSpeed 0.19).
    """
    lm = load_lm(model, config, layout=layout, longest=longest, like=like)
    if model.lora is not None:
        with partitioned_loading(config):
            lm = add_adapter(lm, model, seed=0, trainable=False)
    scorer = ResponseScorer(lm, token_weights=token_weights, sequence=sequence).requires_grad_(False)
    engine = initialize(model=scorer, config=config)
    engine.eval()
    return engine


def initialize(**options: Any) -> deepspeed.DeepSpeedEngine:
    """An engine of `deepspeed.initialize`, without the screen full of memory figures. Collective.

    DeepSpeed 0.19's BF16_Optimizer, which also serves engines at stage 0, prints them unasked; here they are logged.
    """
    with redirect_stdout(io.StringIO()) as printed:
        engine, *_ = deepspeed.initialize(**options)
    for line in printed.getvalue().splitlines():
        log.info(line)
    count_gathers_of(engine)
    return engine


def warm_up(policy: deepspeed.DeepSpeedEngine, batch: PreferenceBatch) -> None:
    """One forward and backward of zero loss, before anything else runs on the policy. Collective.

    What does not fit in memory fails now. And ZeRO-3 records the order of its gathers, for prefetching, in the first
    pass: were that one without gradient, training passes would break the record for ever (DeepSpeed 0.19).
    """
    policy.backward(policy(batch=batch).sum() * 0.0, scale_wrt_gas=False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer; biases and norms are not decayed, as in Hugging Face's Trainer."""
    no_decay = re.compile(r"(^|\.)bias$|norm", re.IGNORECASE)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not weight_decay:
        return [{"params": [parameter for _, parameter in trainable], "weight_decay": 0.0}]
    groups = [
        {"params": [p for name, p in trainable if not no_decay.search(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if no_decay.search(name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerConfig, config: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW for where the DeepSpeed config keeps optimizer states."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    if offload_device(config, "optimizer") != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=get_accelerator().device_name() == "cuda" or None, **options)
