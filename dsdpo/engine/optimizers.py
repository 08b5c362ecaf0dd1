"""The optimizers that dsdpo makes, for flat partitions on the device or in host memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from dsdpo.config.optimizer import OptimizerConfig
from dsdpo.engine.deepspeed_keys import lookup
from dsdpo.engine.optimizer_limits import optimizer_kind, sums_in_float32
from dsdpo.engine.quirks.muon import make_muon
from dsdpo.engine.zero_config import offload_device
from dsdpo.errors import ConfigError

Groups = list[dict[str, Any]]
NOT_HIDDEN = re.compile(r"embed|lm_head")  # DeepSpeed's own rule for what Muon leaves to Adam
NO_DECAY = re.compile(r"(^|\.)bias$|norm", re.IGNORECASE)


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Trainable parameters for an optimizer; biases and norms are not decayed, as in Hugging Face's Trainer."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not weight_decay:
        return [{"params": [parameter for _, parameter in trainable], "weight_decay": 0.0}]
    groups = [
        {"params": [p for name, p in trainable if not NO_DECAY.search(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if NO_DECAY.search(name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, groups: Groups, settings: OptimizerConfig, config: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of the settings, for where the DeepSpeed config keeps its states.

    AdamW is DeepSpeed's in host memory, else torch's; Lion DeepSpeed's in host memory, else bitsandbytes' of 32 bits,
    which needs no compiler; 8-bit AdamW bitsandbytes'; Muon DeepSpeed's; SGD torch's. `groups` are those of `model`.
    """
    on_host = offload_device(config, "optimizer") != "none"
    betas = (settings.adam_beta1, settings.adam_beta2)
    rate = settings.learning_rate
    adam: dict[str, Any] = {"betas": betas, "eps": settings.adam_epsilon}
    match settings.type:
        case "lion" if on_host:
            return deepspeed.ops.lion.DeepSpeedCPULion(groups, lr=rate, betas=betas)
        case "lion":
            from bitsandbytes.optim import Lion32bit

            return Lion32bit(groups, lr=rate, betas=betas)
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, lr=rate, **adam)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=settings.momentum, nesterov=settings.nesterov)
        case "muon":
            other = rate if settings.adam_learning_rate is None else settings.adam_learning_rate
            return make_muon(
                [*_halves(model, groups, lr=rate, momentum=settings.momentum, adam={"lr": other, **adam})],
                fused=None if on_host else _fused(),
            )
    if on_host:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=rate, adamw_mode=True, **adam)
    return torch.optim.AdamW(groups, lr=rate, fused=_fused(), **adam)


def _fused() -> bool | None:
    return get_accelerator().device_name() == "cuda" or None


def _halves(
    model: nn.Module, groups: Groups, *, lr: float, momentum: float, adam: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Each group as up to two: hidden matrices for Muon; embeddings, output head and vectors for AdamW."""
    matrices = {id(parameter) for parameter in hidden_matrices(model)}
    for group in groups:
        for muon in (True, False):
            half = [parameter for parameter in group["params"] if (id(parameter) in matrices) is muon]
            if half:
                own = {"lr": lr, "momentum": momentum} if muon else adam
                yield {"params": half, "weight_decay": group["weight_decay"], "use_muon": muon, **own}


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable matrices (and stacks of them, as of experts) between embeddings and output head.

    As DeepSpeed tells them by their names, and a model's own embeddings and head under any name.
    """
    found = []
    ends = set()
    for module in model.modules():
        for part in ("get_input_embeddings", "get_output_embeddings"):
            if hasattr(module, part):
                try:
                    end = getattr(module, part)()
                except NotImplementedError:
                    continue
                ends |= {id(parameter) for parameter in end.parameters()} if end is not None else set()
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if parameter.requires_grad and len(shape) >= 2 and id(parameter) not in ends and not NOT_HIDDEN.search(name):
            found.append(parameter)
    return found


def refuse_matrices(lm: nn.Module, config: dict[str, Any], *, source: str) -> None:
    """Raise `ConfigError` where Muon cannot take the shapes of a model, which may be a blank one with its adapter.

    DeepSpeed 0.19.8 does so once the model is loaded, in the optimizer that it has for stage 1 in bfloat16 with sums in
    float32.
    """
    at_1 = lookup(config, "zero_optimization.stage") == 1 and offload_device(config, "optimizer") == "none"
    if optimizer_kind(config) != "muon" or not (at_1 and lookup(config, "bf16.enabled") and sums_in_float32(config)):
        return
    chosen = {id(parameter) for parameter in hidden_matrices(lm)}
    for name, parameter in lm.named_parameters():
        if id(parameter) in chosen and parameter.dim() != 2:
            raise ConfigError(
                f"{source}: at zero_optimization.stage 1 in bfloat16 with data_types.grad_accum_dtype fp32 DeepSpeed's "
                f"Muon takes matrices only, and {name} has the shape {list(parameter.shape)}: set the stage to 2 or 3, "
                "or delete grad_accum_dtype"
            )
