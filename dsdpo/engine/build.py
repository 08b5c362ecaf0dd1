"""The two engines: a policy that trains and a reference that only answers, each under its own DeepSpeed config."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import get_scheduler

from dsdpo.config.model import ModelConfig
from dsdpo.config.run import RunConfig
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.binning import LayoutName
from dsdpo.distributed import rank
from dsdpo.engine.load import load_lm, partitioned_loading
from dsdpo.engine.lora import add_adapter, add_reference_adapter
from dsdpo.engine.optimizer_limits import makes_optimizer
from dsdpo.engine.optimizers import make_optimizer, parameter_groups
from dsdpo.engine.quirks.gather_trace import count_gathers_of
from dsdpo.engine.start import start_distributed as start_distributed
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

    The optimizer is the run's (`make_optimizer`), or DeepSpeed's own where only the JSON names one.
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
        output_head=run.model.output_head,
        token_weights=TokenWeights.of(run.loss),
        sequence=sequence,
    )
    groups = parameter_groups(model, run.optimizer.weight_decay)
    ours = "optimizer" not in config or makes_optimizer(run)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        warmup = run.optimizer.num_warmup_steps(total_steps)
        options = dict(run.optimizer.lr_scheduler_kwargs)
        return get_scheduler(run.optimizer.lr_scheduler_type, optimizer, warmup, total_steps, options)

    engine = initialize(
        model=model,
        config=config,
        model_parameters=groups,
        optimizer=make_optimizer(model, groups, run.optimizer, config) if ours else None,
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
    scorer = ResponseScorer(
        lm, output_head=model.output_head, token_weights=token_weights, sequence=sequence
    ).requires_grad_(False)
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
