"""The loss's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from dsdpo.config.section import Section


class LossConfig(Section):
    """The preference loss."""

    type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid (DPO), hinge (SLiC) or ipo."""
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference, per nat of log-ratio (tau for ipo)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share (0 to 0.5) of pairs whose label is flipped; sigmoid only."""

    @model_validator(mode="after")
    def _has_effect(self) -> LossConfig:
        if self.label_smoothing and self.type != "sigmoid":
            raise ValueError(
                f"loss.label_smoothing {self.label_smoothing} has no effect with loss.type {self.type}: "
                "set loss.label_smoothing to 0 or loss.type to sigmoid"
            )
        return self
