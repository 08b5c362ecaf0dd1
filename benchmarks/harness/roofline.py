"""The shortest possible step on paper: its arithmetic and the bytes it has to move, at the device's measured peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.kinds import (
    ATTENTION,
    COLLECTIVE,
    COPY,
    ELEMENTWISE,
    GEMM,
    HEAD,
    HOST,
    NORM,
    OPTIMIZER,
    WAIT,
)


@dataclass(frozen=True)
class Peak:
    """Medians of what was measured, in units of 1e12 operations and 1e9 bytes a second."""

    tflops: float
    copy_gb_s: float  # read and written bytes together
    link_gb_s: float | None  # host to device from pinned memory; None on a CPU
    launch_us: float  # of one small kernel


# What AdamW reads and writes of one trained weight beside 16-bit weights and gradients: float32 weight, both moments.
ADAM_BYTES = 2 * (4 + 4 + 4) + 2 + 2


@dataclass(frozen=True)
class Floor:
    """Seconds of one optimizer step that no implementation goes below."""

    arithmetic_s: float  # the formulas' operations: no padding, no recomputation, each prompt once
    update_s: float  # the optimizer's states through memory, or over the host link where they are offloaded

    @property
    def step_s(self) -> float:
        """Both, one after the other: the update needs the whole gradient."""
        return self.arithmetic_s + self.update_s


def floor_of_step(*, flops: float, trained: float, peak: Peak, offloaded: bool = False) -> Floor:
    """The floor of a step of `flops` operations on one device that trains `trained` weights.

    With offloaded states, 16-bit gradients go over the host link and 16-bit weights come back.
    """
    if offloaded:
        if peak.link_gb_s is None:
            raise ValueError("no host link was measured: a CPU has none")
        update = 2 * 2 * trained / (peak.link_gb_s * 1e9)
    else:
        update = ADAM_BYTES * trained / (peak.copy_gb_s * 1e9)
    return Floor(flops / (peak.tflops * 1e12), update)


@dataclass(frozen=True)
class Work:
    """What a step asks of one rank: operations, and elements that pass through memory at least once."""

    trunk: float  # operations of products below the head
    attention: float
    head: float
    tokens: float  # through the layers
    trained: float  # weights whose optimizer states the rank has
    exchanged: float = 0.0  # bytes of weights gathered and gradients reduced
    copied: float = 0.0  # bytes between host and device
    reference: bool = True  # whether a second model scores the tokens in this step


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, of a Llama's make, from a model's config.json."""

    hidden: int
    layers: int
    queries: int  # heads times head size
    keys: int
    intermediate: int
    itemsize: int

    @classmethod
    def of(cls, config: Mapping[str, Any], *, itemsize: int) -> Shape:
        """Where a size has no name of its own, what follows from the others."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        keys = size * (config.get("num_key_value_heads") or heads)
        return cls(hidden, config["num_hidden_layers"], size * heads, keys, config["intermediate_size"], itemsize)

    def norms_bytes(self, *, backward: bool) -> float:
        """A token's traffic of norms and rotary embeddings, each fused into one kernel.

        Forward, each element is read and written; a norm's backward reads two for one that it writes.
        """
        norms, rotary = (2 * self.layers + 1) * self.hidden, self.layers * (self.queries + self.keys)
        return self.itemsize * (2.0 * (norms + rotary) + (3 * norms + 2 * rotary if backward else 0))

    def elementwise_bytes(self, *, backward: bool) -> float:
        """The same of both residual sums of a layer, its gated MLP's product, and the embedding."""
        sums, gated = 2 * self.layers * self.hidden, self.layers * self.intermediate
        forward = 3.0 * sums + 3 * gated + 2 * self.hidden
        return self.itemsize * (forward + (3 * sums + 5 * gated + 2 * self.hidden if backward else 0))


def shortest(work: Work, shape: Shape, peak: Peak, *, offloaded: bool = False) -> dict[str, float]:
    """Seconds of a step on one rank by kind of work that the peak allows, each kind alone and nothing beside it."""
    operations, memory = peak.tflops * 1e12, peak.copy_gb_s * 1e9
    passes = [True, False] if work.reference else [True]
    update = floor_of_step(flops=0.0, trained=work.trained, peak=peak, offloaded=offloaded).update_s
    return {
        GEMM: work.trunk / operations,
        ATTENTION: work.attention / operations,
        HEAD: work.head / operations,
        NORM: sum(work.tokens * shape.norms_bytes(backward=one) for one in passes) / memory,
        ELEMENTWISE: sum(work.tokens * shape.elementwise_bytes(backward=one) for one in passes) / memory,
        OPTIMIZER: update,
        COLLECTIVE: 2 * work.exchanged / memory,  # what comes in is written and read at least
        COPY: work.copied / (peak.link_gb_s * 1e9) if peak.link_gb_s else 0.0,
        WAIT: 0.0,
        HOST: 0.0,
    }
