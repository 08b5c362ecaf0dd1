"""The shortest possible step on paper: its arithmetic and the bytes it has to move, at the device's measured peak."""

from __future__ import annotations

from dataclasses import dataclass


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
