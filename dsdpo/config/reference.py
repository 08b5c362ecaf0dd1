"""The reference's settings: which strategy, whose weights, and how it moves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dsdpo.config.section import PathText, Section


class ReferenceConfig(Section):
    """The reference model: whose weights, where they live and when they are asked."""

    strategy: Literal["auto", "adapter", "precomputed", "separate", "policy_snapshot"] = "auto"
    """separate: its own inference-only engine; adapter: the policy's base weights, for model.lora; precomputed: an
    engine that scores all pairs before training and goes; policy_snapshot: TR-DPO with alpha 1 and no weights, where
    the policy scores for the next steps at each sync; auto: adapter if that fits the run, else separate."""
    adapter: Literal["initial", "base"] = "initial"
    """For a policy that goes on with an adapter. initial: the reference has that adapter, frozen; base: none."""
    path: PathText | None = None
    """Folder or Hub id of the reference; null: the model that the policy starts from."""
    revision: str | None = None
    """Hub branch, tag or commit of the reference; null: model.revision if the path is the policy's."""
    deepspeed: PathText | None = None
    """DeepSpeed JSON of the reference engine (stage 0 or 3); null: derived from the policy's."""
    score_tokens: PositiveInt = 32768
    """Tokens in one scoring forward pass on one rank; a longer pair goes alone."""
    look_ahead_steps: PositiveInt = 1
    """Optimizer steps whose pairs are scored together, never beyond a sync; pays if score_tokens holds them all."""
    sync_ref_model: bool = False
    """TR-DPO: move the reference towards the policy as training goes (arXiv 2404.09656)."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the policy in the moved reference; 1 copies it."""
    ref_model_sync_steps: PositiveInt = 512
    """Optimizer steps between two moves."""
    store: Annotated[str | None, Field(min_length=1)] = None
    """Folder that precomputed log-probs are kept in and taken from; null: beside the prepared data (data.cache_dir)."""
    audit_rows: NonNegativeInt = 16
    """Pairs per data set that are scored again to check those found in the store; 0: none."""

    @model_validator(mode="after")
    def _strategy_fits(self) -> ReferenceConfig:
        if self.strategy == "precomputed" and self.sync_ref_model:
            raise ValueError(
                "reference.sync_ref_model moves the reference while it trains, but reference.strategy precomputed asks "
                "it only once, before training: set reference.strategy to separate, or leave sync_ref_model out"
            )
        if self.strategy == "policy_snapshot" and not (self.sync_ref_model and self.ref_model_mixup_alpha == 1.0):
            raise ValueError(
                "reference.strategy policy_snapshot is TR-DPO with a whole copy at each sync: set "
                f"reference.sync_ref_model to true (now {str(self.sync_ref_model).lower()}) and "
                f"reference.ref_model_mixup_alpha to 1 (now {self.ref_model_mixup_alpha}), or choose another strategy"
            )
        if self.strategy == "policy_snapshot" and (self.path or self.revision or self.deepspeed):
            raise ValueError(
                "reference.path, reference.revision and reference.deepspeed have no effect with reference.strategy "
                "policy_snapshot, whose reference is the policy itself: leave them out"
            )
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if not self.sync_ref_model and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"reference.{name} {getattr(self, name)} has no effect while reference.sync_ref_model is false: "
                    "set that to true, or leave it out"
                )
        if self.look_ahead_steps > 1 and self.strategy in ("precomputed", "policy_snapshot"):
            raise ValueError(
                f"reference.look_ahead_steps {self.look_ahead_steps} has no effect with reference.strategy "
                f"{self.strategy}, which scores further ahead by itself: leave it out, or set strategy to separate"
            )
        if self.strategy != "precomputed" and self.store is not None:
            raise ValueError(
                f"reference.store {self.store} has no effect with reference.strategy {self.strategy}: set that to "
                "precomputed, or leave store out"
            )
        return self
