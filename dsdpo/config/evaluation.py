"""What is asked of held-out data while a run goes on: metrics of pairs, and answers to fixed prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from dsdpo.config.loss import as_text_list
from dsdpo.config.section import PathText, Section

# A held-out metric as it stands in metrics.jsonl.
HeldOutMetric = Annotated[str, Field(pattern=r"^eval/.+")]


class SamplesConfig(Section):
    """Fixed prompts that the policy answers as training goes, the reference beside it, into samples.jsonl."""

    prompts: PathText
    """File of prompts: .txt with one a line, or rows with a field prompt in any format of data.train (text, messages,
    or whole pairs, whose responses are left out)."""
    n: PositiveInt = 8
    """Prompts to answer, the first ones of the file; fewer if it has fewer."""
    every_steps: NonNegativeInt | None = None
    """Optimizer steps between answers, which are also given at the end, and at the start if evaluation.at_start; 0:
    only then; null: evaluation.every_steps."""
    max_new_tokens: PositiveInt = 256
    """Tokens after which an answer is cut off."""
    temperature: NonNegativeFloat = 0.0
    """Divides the logits before a token is drawn; 0: the likeliest token each time (greedy)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that together have this probability; 1: among all."""
    gather: Literal["auto", "whole", "layers"] = "auto"
    """Under ZeRO-3. whole: gather all weights once for all answers; layers: layer by layer for each token; auto: whole
    where that takes at most half of every rank's free memory."""

    @model_validator(mode="after")
    def _draws(self) -> SamplesConfig:
        if self.top_p < 1.0 and self.temperature == 0.0:
            raise ValueError(
                f"evaluation.samples.top_p {self.top_p:g} has no effect with evaluation.samples.temperature 0, which "
                "takes the likeliest token: set temperature above 0, or leave top_p out"
            )
        return self


class EvaluationConfig(Section):
    """When the held-out pairs of data.eval are scored."""

    every_steps: NonNegativeInt = 100
    """Optimizer steps between evaluations; 0: only at the start and the end."""
    at_start: bool = True
    """Evaluate once before the first step."""
    length_buckets: Annotated[list[PositiveInt], BeforeValidator(as_text_list)] = Field(default=[512, 1024, 2048])
    """Tokens of prompt and longer response up to which metrics are given apart, ascending; []: not by length."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a better metric after which training ends; null: it never ends early."""
    metric: HeldOutMetric = "eval/loss"
    """The held-out metric of patience; see checkpoint.best_metric for which way is better."""
    samples: SamplesConfig | None = None
    """Answers to fixed prompts: {prompts: FILE, n, every_steps, max_new_tokens, ...}; null: none."""

    @model_validator(mode="after")
    def _is_sound(self) -> EvaluationConfig:
        if self.length_buckets != sorted(set(self.length_buckets)):
            raise ValueError(f"evaluation.length_buckets {self.length_buckets} must ascend, each value once")
        if self.patience is not None and self.every_steps == 0:
            raise ValueError(
                f"evaluation.patience {self.patience} has no effect with evaluation.every_steps 0: set that above 0, "
                "or leave patience out"
            )
        if self.patience is None and self.metric != "eval/loss":
            raise ValueError(
                f"evaluation.metric {self.metric} has no effect without evaluation.patience: set that, or leave it out"
            )
        return self
