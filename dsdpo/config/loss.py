"""The loss's settings, and which losses there are: what each takes, needs and can do without.

A new loss is one function of its name in `objective/losses/`, one line in `LOSSES`, and a field of `LossConfig` for
each option that is its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dsdpo.config.section import Section

ReferenceUse = Literal["needed", "optional", "unused"]
RowKind = Literal["pairs", "rated", "lists"]
DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
COMMON = ("rpo_alpha", "use_weighting", "ld_alpha", "decay")  # of every loss of a pair's two summed log-probs


@dataclass(frozen=True)
class LossKind:
    """What a loss takes and needs; its formula is the function of its name in `objective/losses/`."""

    options: tuple[str, ...] = ()  # fields of `LossConfig` that it takes, beta aside
    common: tuple[str, ...] = COMMON
    reference: ReferenceUse = "needed"
    beta: bool = True
    column: str | None = None  # that the data must have
    step_tokens: bool = False  # the number of chosen tokens in the whole step
    step_logps: bool = False  # log-probs of all pairs of the step, before the first backward pass
    rows: RowKind = "pairs"  # that it is defined for: pairs, one completion rated desirable or not, or ranked lists
    mismatched: bool = False  # of rated completions: the log-prob of a completion of another prompt beside each
    own: dict[str, Any] = field(default_factory=dict)  # of a registered loss: its `options`, with their defaults


SMOOTHED = ("label_smoothing", *DIVERGENCE)
BY_PAIR = (*SMOOTHED, "label_confidence")  # smoothed by what each pair's own confidence says, too
RATED = ("desirable_weight", "undesirable_weight")
SORTED = tuple(name for name in COMMON if name != "use_weighting")

LOSSES: dict[str, LossKind] = {
    "sigmoid": LossKind((*BY_PAIR, "beta_dpo_alpha"), reference="optional"),
    "robust": LossKind(BY_PAIR),
    "hinge": LossKind((*DIVERGENCE, "beta_dpo_alpha"), reference="optional"),
    "ipo": LossKind((*DIVERGENCE, "beta_dpo_alpha"), reference="optional"),
    "exo_pair": LossKind(SMOOTHED),
    "discopop": LossKind((*DIVERGENCE, "discopop_tau")),
    "sigmoid_norm": LossKind((*DIVERGENCE, "beta_dpo_alpha"), reference="optional"),
    "nca_pair": LossKind(),
    "bco_pair": LossKind(("bco_running_delta",)),
    "sppo_hard": LossKind(),
    "apo_zero": LossKind(),
    "apo_down": LossKind(),
    "dpop": LossKind(("dpop_lambda",)),
    "dpo_shift": LossKind(("dpo_shift_lambda",)),
    "cal_dpo": LossKind(),
    "alpha_dpo": LossKind(("alpha_dpo_alpha", "simpo_gamma"), step_logps=True),
    "odpo": LossKind(("margin_scale",), column="margin"),
    "reward_rpo": LossKind(("margin_scale",), column="margin"),
    "aot": LossKind(("label_smoothing",), common=SORTED, step_logps=True),
    "aot_unpaired": LossKind(("label_smoothing",), common=SORTED, step_logps=True),
    "kto": LossKind(RATED, common=(), step_logps=True, rows="rated", mismatched=True),
    "apo_zero_unpaired": LossKind(RATED, common=(), rows="rated"),
    "plackett_luce": LossKind(common=(), rows="lists"),
    "best_vs_rest": LossKind(common=(), rows="lists"),
    "all_pairs": LossKind(common=(), rows="lists"),
    "simpo": LossKind(("label_smoothing", "label_confidence", "simpo_gamma"), reference="unused"),
    "cpo": LossKind(("label_smoothing", "label_confidence", "cpo_alpha"), reference="unused"),
    "orpo": LossKind(reference="unused"),
    "sft": LossKind(common=(), reference="unused", beta=False, step_tokens=True),
}


class BetaSchedule(Section):
    """How beta goes from loss.beta to another value."""

    end: PositiveFloat
    """Value at the last step of the schedule, and after it."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How it goes there: evenly, or slowly at both ends."""
    steps: PositiveInt | None = None
    """Optimizer steps that it takes; null: the whole run."""

    def at(self, step: int, total_steps: int, *, start: float) -> float:
        """The value of optimizer step `step`, counted from 1."""
        last = max(1, (self.steps or total_steps) - 1)
        share = min(1.0, max(0, step - 1) / last)
        if self.schedule == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return start + (self.end - start) * share


def as_text_list(value: Any) -> Any:
    """A list written as text on the command line, as a list: [sigmoid,sft]."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        return [part.strip().strip("'\"") for part in value[1:-1].split(",") if part.strip()]
    return value


class LossConfig(Section):
    """The preference loss, or several with a weight each."""

    type: Annotated[str | list[str], BeforeValidator(as_text_list)] = "sigmoid"
    """Name of the loss (sigmoid is DPO), or a list of names that are added up; docs/objectives.md has them all."""
    weights: Annotated[list[NonNegativeFloat] | None, BeforeValidator(as_text_list)] = None
    """Weight of each loss of a list, in its order; null: 1 each."""
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference, per nat of log-ratio (tau for ipo, lambda for orpo). In a run file
    also {start, end, schedule, steps} for one that changes."""
    beta_schedule: BetaSchedule | None = None
    """How beta changes over the steps; null: not at all."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share (0 to 0.5) of pairs whose label is flipped."""
    label_confidence: bool = False
    """Take each pair's label_smoothing from the data: 1 less its column confidence, how likely its label is right."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference that the implicit reward belongs to (f-DPO)."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; 1 is reverse_kl."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """LD-DPO: weight (0 to 1) of response tokens beyond the shorter response's length; null: all count alike."""
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """D2PO: weight of response token t is decay to the power t, counted from 0; null: all count alike."""
    use_weighting: bool = False
    """WPO: weigh pairs by how likely the policy is to write them itself."""
    rpo_alpha: PositiveFloat | None = None
    """RPO: add the mean negative log-prob of the chosen response's tokens, times this; null: no."""
    discopop_tau: PositiveFloat = 0.05
    """Temperature of discopop's mixture."""
    simpo_gamma: NonNegativeFloat = 0.5
    """Margin between the two responses' rewards that simpo and alpha_dpo ask for."""
    cpo_alpha: NonNegativeFloat = 1.0
    """Weight of cpo's mean negative log-prob of the chosen response's tokens."""
    dpop_lambda: NonNegativeFloat = 50.0
    """Weight of dpop's penalty for a chosen response less likely than under the reference, per nat."""
    dpo_shift_lambda: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share (0 to 1) of the rejected response's reward that dpo_shift counts; 1 is sigmoid."""
    alpha_dpo_alpha: NonNegativeFloat = 0.1
    """Weight of alpha_dpo's standardized log-ratio margin in the margin that it asks for."""
    margin_scale: PositiveFloat = 1.0
    """Reward that one unit of the data's margin column stands for."""
    bco_running_delta: bool = False
    """Subtract from bco_pair's rewards their mean over all earlier steps."""
    beta_dpo_alpha: NonNegativeFloat | None = None
    """Beta-DPO: how strongly beta follows the step's mean reward margin; null: not at all."""

    desirable_weight: PositiveFloat = 1.0
    """Weight of completions that are rated desirable."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of completions that are rated undesirable."""
    options: dict[str, bool | int | float | str] = Field(default={})
    """Options of losses that were registered from Python, by the names of the function's parameters."""

    @property
    def types(self) -> tuple[str, ...]:
        """The names of all parts."""
        return (self.type,) if isinstance(self.type, str) else tuple(self.type)

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """Name and weight of each part."""
        return tuple(zip(self.types, self.weights or [1.0] * len(self.types), strict=True))

    @property
    def reference_use(self) -> ReferenceUse:
        """needed: a reference must be there; optional: it may be left out; unused: it would have no effect."""
        uses = {LOSSES[name].reference for name in self.types}
        return "needed" if "needed" in uses else "optional" if "optional" in uses else "unused"

    @property
    def rows(self) -> RowKind:
        """What a row of the data must be; all parts agree on it."""
        return LOSSES[self.types[0]].rows

    @property
    def mismatched(self) -> bool:
        """True if the loss needs a completion of another prompt beside each rated one."""
        return any(LOSSES[name].mismatched for name in self.types)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the training data must have."""
        own = {kind.column for kind in map(LOSSES.__getitem__, self.types) if kind.column}
        return tuple(sorted(own | ({"confidence"} if self.label_confidence else set())))

    @property
    def token_weights(self) -> str | None:
        """What log-probs summed for this loss depend on beside the tokens, as text; None: nothing."""
        parts = [f"{name} {getattr(self, name)}" for name in ("ld_alpha", "decay") if getattr(self, name) is not None]
        return ", ".join(parts) or None

    def beta_at(self, step: int, total_steps: int) -> float:
        """Beta of optimizer step `step`, counted from 1."""
        return self.beta_schedule.at(step, total_steps, start=self.beta) if self.beta_schedule else self.beta

    def describe(self) -> str:
        """The loss in a few words."""
        named = [name if weight == 1.0 else f"{weight:g} {name}" for name, weight in self.parts]
        moves = self.beta_schedule
        beta = f"beta {self.beta:g}" + (f" to {moves.end:g} ({moves.schedule})" if moves else "")
        apart = ("type", "weights", "beta", "beta_schedule", "options")
        own = [name for name in type(self).model_fields if name not in apart]
        others = [f"{name} {_shown(getattr(self, name))}" for name in own if self._is_set(name)]
        others += [f"{name} {_shown(value)}" for name, value in self.options.items()]
        return ", ".join([" + ".join(named), *([beta] if self.types != ("sft",) else []), *others])

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @model_validator(mode="before")
    @classmethod
    def _beta_may_be_a_schedule(cls, settings: Any) -> Any:
        beta = settings.get("beta") if isinstance(settings, dict) else None
        if not isinstance(beta, dict) or "start" not in beta:
            return settings
        rest = {name: value for name, value in beta.items() if name != "start"}
        return {**settings, "beta": beta["start"], "beta_schedule": rest}

    @model_validator(mode="after")
    def _types_are_known(self) -> LossConfig:
        if not self.types:
            raise ValueError("loss.type [] is empty: give the name of a loss or of several")
        for name in self.types:
            if name not in LOSSES:
                raise ValueError(f"loss.type is {name!r}: input should be {listed(list(LOSSES))}")
        doubled = next((name for name in self.types if self.types.count(name) > 1), None)
        if doubled:
            raise ValueError(f"loss.type names {doubled} more than once: give it one weight in loss.weights")
        other = next((name for name in self.types if LOSSES[name].rows != LOSSES[self.types[0]].rows), None)
        if other:
            kinds = {"pairs": "pairs", "rated": "single rated completions", "lists": "lists"}
            words = [f"{name} is a loss of {kinds[LOSSES[name].rows]}" for name in (self.types[0], other)]
            raise ValueError(f"loss.type: {' and '.join(words)}, and data has rows of one kind: leave one of them out")
        if self.weights is not None and len(self.weights) != len(self.types):
            raise ValueError(
                f"loss.weights {self.weights} has {len(self.weights)} values for {len(self.types)} losses "
                f"({', '.join(self.types)}): give one each, or leave it out for 1 each"
            )
        if self.weights is not None and not any(self.weights):
            raise ValueError(f"loss.weights {self.weights} are all 0: nothing would be trained")
        return self

    @model_validator(mode="after")
    def _own_options_are_known(self) -> LossConfig:
        known = {key: default for name in self.types for key, default in LOSSES[name].own.items()}
        for key, value in self.options.items():
            if key not in known:
                theirs = f"takes {', '.join(known)}" if known else "is of dsdpo, whose options are settings of loss"
                raise ValueError(f"loss.options.{key}: loss.type {' + '.join(self.types)} {theirs}")
            number = isinstance(known[key], float) and isinstance(value, int) and not isinstance(value, bool)
            if known[key] is not None and type(value) is not type(known[key]) and not number:
                raise ValueError(
                    f"loss.options.{key} is {value!r}: give a {type(known[key]).__name__}, as its default "
                    f"{known[key]!r} is"
                )
        return self

    @model_validator(mode="after")
    def _options_have_effect(self) -> LossConfig:
        for name in type(self).model_fields:
            if name in ("type", "weights", "options") or not self._is_set(name):
                continue
            takers = [loss for loss in LOSSES if takes(loss, name)]
            if not any(loss in takers for loss in self.types):
                value, now = getattr(self, name), " + ".join(self.types)
                off = type(self).model_fields[name].default
                raise ValueError(
                    f"loss.{name} {_shown(value)} has no effect with loss.type {now}: set loss.{name} to "
                    f"{_shown(off)} or loss.type to {listed(takers)}"
                )
        others = [name for name in self.types if name != "sft" and not takes(name, "f_divergence_type")]
        if self.f_divergence_type != "reverse_kl" and others:
            raise ValueError(
                f"loss.f_divergence_type {self.f_divergence_type} is not defined for loss.type {others[0]}: set it to "
                f"reverse_kl, or loss.type to {listed([loss for loss in LOSSES if takes(loss, 'f_divergence_type')])}"
            )
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"loss.f_alpha_divergence_coef {self.f_alpha_divergence_coef:g} has no effect with "
                f"loss.f_divergence_type {self.f_divergence_type}: set that to alpha_divergence, or leave it out"
            )
        if "exo_pair" in self.types and self.label_smoothing == 0.0:
            raise ValueError(
                "loss.label_smoothing 0 makes exo_pair infinite (it takes its logarithm): set it above 0, such as 0.001"
            )
        if self.label_confidence and self.label_smoothing:
            raise ValueError(
                f"loss.label_confidence true takes each pair's smoothing from the data: leave loss.label_smoothing "
                f"{self.label_smoothing:g} out, or label_confidence"
            )
        if self.beta_dpo_alpha is not None and self.beta_schedule is not None:
            raise ValueError("loss.beta_dpo_alpha moves beta by itself: leave it or loss.beta_schedule out")
        return self


def takes(loss: str, option: str) -> bool:
    """True if an option has effect on a loss."""
    kind = LOSSES[loss]
    return kind.beta if option in ("beta", "beta_schedule") else option in kind.options or option in kind.common


def listed(names: Sequence[str]) -> str:
    """'a', 'b' or 'c'."""
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    words = {"None": "null", "True": "true", "False": "false"}
    return f"{value:g}" if isinstance(value, float) else words.get(str(value), str(value))
