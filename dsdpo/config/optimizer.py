"""The optimizer's settings, and which optimizers there are: the options that each takes, and their defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, field_validator, model_validator

from dsdpo.config.section import Section

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]

# transformers.get_polynomial_decay_schedule_with_warmup ends at this rate and refuses a smaller start.
POLYNOMIAL_END = 1e-7
FORMS = ("linear", "cosine", "1-sqrt")
# What transformers' schedules take in lr_scheduler_kwargs: the largest number, or the words.
SCHEDULE_OPTIONS: dict[str, dict[str, float | tuple[str, ...]]] = {
    "cosine": {"num_cycles": math.inf},
    "cosine_with_restarts": {"num_cycles": math.inf},
    "cosine_with_min_lr": {"min_lr_rate": 1.0, "min_lr": math.inf, "num_cycles": math.inf},
    "polynomial": {"lr_end": math.inf, "power": math.inf},
    "inverse_sqrt": {"timescale": math.inf},
    "warmup_stable_decay": {"num_decay_steps": math.inf, "min_lr_ratio": 1.0, "num_cycles": math.inf,
                            "warmup_type": FORMS, "decay_type": FORMS},
}  # fmt: skip


@dataclass(frozen=True)
class OptimizerKind:
    """What an optimizer takes beside learning rate, weight decay and schedule."""

    options: tuple[str, ...]  # fields of `OptimizerConfig`
    defaults: dict[str, Any] = field(default_factory=dict)  # of fields, where they are not the field's own


ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(ADAM),
    "adamw_8bit": OptimizerKind(ADAM),
    "lion": OptimizerKind(("adam_beta1", "adam_beta2"), {"adam_beta2": 0.99}),
    "muon": OptimizerKind(("momentum", "adam_learning_rate", *ADAM), {"momentum": 0.95, "max_grad_norm": 0.0}),
    "sgd": OptimizerKind(("momentum", "nesterov")),
}
OPTIONS = ("adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "nesterov", "adam_learning_rate")
NO_ADAFACTOR = (
    "optimizer.type adafactor is not adafactor under ZeRO: it keeps means over the rows and columns of each matrix and "
    "scales updates by each matrix's size, but ZeRO hands an optimizer one flat vector of all matrices, of which it "
    "keeps every element's own, on one rank too: take adamw_8bit (2 bytes a weight) or lion (4), or optimizer states "
    "in host memory (ds_configs/zero3_offload.json)"
)


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule."""

    type: Literal["adamw", "adamw_8bit", "lion", "muon", "sgd"] | None = None
    """Which optimizer (docs/optimizers.md); null: that of the DeepSpeed JSON, adamw where it has none."""
    learning_rate: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay per unit of learning rate; sgd adds it to the gradient."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean, per step; of lion its share in the update."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the squared gradient's running mean, per step; of lion that of the gradient's, then 0.99 if left out."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the update's denominator."""
    adam_learning_rate: NonNegativeFloat | None = None
    """Peak learning rate of what muon leaves to AdamW: embeddings, output head, norms, biases; null: learning_rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of sgd's last update in the next one; of muon the decay of the gradient's running mean, then 0.95 if left
    out."""
    nesterov: bool = False
    """Nesterov's momentum, for sgd; muon always has it."""
    lr_scheduler_type: Scheduler = "linear"
    """transformers' name of the schedule."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default={})
    """What the schedule takes beside the warm-up, as in transformers, e.g. {min_lr_rate: 0.1} of cosine_with_min_lr."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises from 0."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same as a share of all steps; set only one of the two."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0: no clipping, as with muon."""

    @field_validator("type", mode="before")
    @classmethod
    def _is_one_under_zero(cls, value: Any) -> Any:
        if str(value).lower() == "adafactor":
            raise ValueError(NO_ADAFACTOR)
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_type(cls, settings: Any) -> Any:
        kind = OPTIMIZERS.get(str(settings.get("type"))) if isinstance(settings, dict) else None
        return {**kind.defaults, **settings} if kind else settings

    @model_validator(mode="after")
    def _options_have_effect(self) -> OptimizerConfig:
        kind = OPTIMIZERS[self.type or "adamw"]
        for name in OPTIONS:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if name not in kind.options and value != default:
                takers = [other for other, each in OPTIMIZERS.items() if name in each.options]
                raise ValueError(
                    f"optimizer.{name} {_shown(value)} has no effect with optimizer.type {self.type or 'adamw'}: set "
                    f"optimizer.{name} to {_shown(default)} or optimizer.type to {' or '.join(takers)}"
                )
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov true needs optimizer.momentum above 0: set it, such as to 0.9")
        if self.type == "muon" and self.max_grad_norm:
            raise ValueError(
                f"optimizer.max_grad_norm {self.max_grad_norm:g} with optimizer.type muon would scale down updates, "
                "whatever the gradients: DeepSpeed takes the norm after they have been made orthogonal: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _one_schedule(self) -> OptimizerConfig:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optimizer.warmup_steps {self.warmup_steps} and optimizer.warmup_ratio {self.warmup_ratio} "
                "both set the warm-up: keep one"
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError(
                "optimizer.warmup_steps and optimizer.warmup_ratio have no effect with optimizer.lr_scheduler_type "
                "constant: use constant_with_warmup"
            )
        return self

    @model_validator(mode="after")
    def _schedule_takes_its_kwargs(self) -> OptimizerConfig:
        kind, given = self.lr_scheduler_type, self.lr_scheduler_kwargs
        takes, place = SCHEDULE_OPTIONS.get(kind, {}), "optimizer.lr_scheduler_kwargs"
        for name, value in given.items():
            if name not in takes:
                raise ValueError(
                    f"{place} has {name}, which optimizer.lr_scheduler_type {kind} does not take: "
                    f"{'it takes ' + ', '.join(takes) if takes else 'leave it out'}"
                )
            if problem := _unfit(value, takes[name]):
                raise ValueError(f"{place}: {name} is {_shown(value)}: {problem}")
        if kind == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & given.keys()) != 1:
            raise ValueError(
                f"optimizer.lr_scheduler_type {kind} needs one of min_lr and min_lr_rate in {place}, such as "
                "{min_lr_rate: 0.1}, a tenth of the learning rate"
            )
        if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
            raise ValueError(
                f"optimizer.lr_scheduler_type {kind} needs the steps in which the learning rate falls in {place}, such "
                "as {num_decay_steps: 100}"
            )
        lowest = given.get("min_lr", given.get("lr_end", POLYNOMIAL_END) if kind == "polynomial" else 0.0)
        if lowest and self.learning_rate <= lowest:
            raise ValueError(
                f"optimizer.learning_rate {self.learning_rate} must be above {lowest}, where "
                f"optimizer.lr_scheduler_type {kind} ends"
            )
        return self

    def num_warmup_steps(self, total_steps: int) -> int:
        """Warm-up length in steps, out of `total_steps`."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)


def _unfit(value: Any, takes: float | tuple[str, ...]) -> str | None:
    """What is wrong with a value of lr_scheduler_kwargs, None where nothing is."""
    if isinstance(takes, tuple):
        return None if value in takes else f"give one of {', '.join(takes)}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and 0 <= value <= takes and math.isfinite(value):
        return None
    return "give a number, 0 or more" if takes == math.inf else f"give a number from 0 to {takes:g}"


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    words = {"None": "null", "True": "true", "False": "false"}
    return f"{value:g}" if isinstance(value, float) else words.get(str(value), str(value))
