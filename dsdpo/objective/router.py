"""How a mixture-of-experts model deals tokens out to its experts, and the loss that evens it out.

Shapes: E experts, of which a token goes to `top_k`; N positions of a batch. A layer's router gives logits (N, E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dsdpo.errors import ConfigError

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
"""What configurations call the number of experts that a token goes to."""


@dataclass(frozen=True)
class Routing:
    """What a run asks of a model's routers."""

    top_k: int
    coefficient: float = 0.0  # of the load-balancing loss; 0: loads are looked at only


def routing_of(kind: type | None, config: PretrainedConfig, coefficient: float | None) -> Routing | None:
    """What is asked of a model of this class and configuration; None where it has no routers to ask.

    `coefficient` is model.router_aux_loss_coef; None: the one in the configuration. Raises `ConfigError` where one is
    given and the model cannot be asked.
    """
    recorded = getattr(kind, "_can_record_outputs", None) or {}
    top_k = next((int(getattr(config, name)) for name in TOP_K if getattr(config, name, None)), 0)
    if "router_logits" not in recorded or not top_k:
        if coefficient:
            raise ConfigError(
                f"model.router_aux_loss_coef {coefficient:g} has no effect: {config.model_type} is no mixture of "
                "experts whose router's logits transformers gives; set it to 0"
            )
        return None
    own = getattr(config, "router_aux_loss_coef", None) or 0.0
    return Routing(top_k, float(own if coefficient is None else coefficient))


def loads(layers: Sequence[Tensor], counted: Tensor | None, top_k: int) -> Tensor:
    """(2, E) float32, added up over layers and the positions that count (N,) bool.

    Row 0: how often each expert is among a token's `top_k`, without gradient; row 1: the routers' probabilities.
    """
    assert counted is not None
    experts = layers[0].shape[-1]
    weight = counted.reshape(-1).float()
    chosen = torch.zeros(experts, device=weight.device)
    probability = torch.zeros(experts, device=weight.device)
    for logits in layers:
        shares = logits.reshape(-1, experts).float().softmax(-1)
        best = shares.detach().topk(top_k, dim=-1).indices
        chosen = chosen.index_add(0, best.flatten(), weight.repeat_interleave(top_k))
        probability = probability + weight @ shares
    return torch.stack([chosen, probability])


def pull(chosen: Tensor, routing: Routing) -> Tensor:
    """(E,) by which a batch's summed probabilities are multiplied to give its part of the weighted loss of the step.

    The loss is E · Σ_e f_e · P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6, as `load_balancing_loss_func` of
    transformers has it for several layers): f_e the times a token goes to expert e and P_e its probability, both means
    over the tokens and layers of the step. f is a number, so the loss is a sum over tokens once it is known; `chosen`
    (E,) are its sums over the whole step (as in Qiu et al. 2025, arXiv 2501.11873).
    """
    rows = (chosen.sum() / routing.top_k).clamp(min=1)
    return routing.coefficient * len(chosen) * chosen / rows**2


def describe_loads(chosen: Sequence[float], probability: Sequence[float], top_k: int) -> dict[str, float]:
    """Metrics of summed loads of some steps, as means over tokens and layers.

    `aux_loss`: the load-balancing loss, `top_k` where all is even; `load_max` and `load_min`: of the most and the least
    used expert, 1 where all is even; `unused`: the share of experts that no token went to.
    """
    count, rows = len(chosen), sum(chosen) / top_k
    even = sum(chosen) / count
    products = sum(one * other for one, other in zip(chosen, probability, strict=True))
    return {
        "router/aux_loss": count * products / rows**2,
        "router/load_max": max(chosen) / even,
        "router/load_min": min(chosen) / even,
        "router/unused": sum(value == 0 for value in chosen) / count,
    }
