"""What a run's reference is, decided once from its settings and carried by the run's plan."""

from __future__ import annotations

from dataclasses import dataclass

from dsdpo.config.model import ModelConfig
from dsdpo.config.reference import STRATEGIES, StrategySettings, Sync
from dsdpo.config.run import RunConfig


@dataclass(frozen=True)
class ReferencePlan:
    """Whose weights the reference has, where they are held and whether they move."""

    strategy: str  # its name, with `auto` resolved
    settings: StrategySettings
    model: ModelConfig  # the weights that it starts from; without a reference, the policy's
    second_adapter: bool  # a frozen or moving adapter of its own on the policy's base weights

    @property
    def exists(self) -> bool:
        """False if the run has none, which suits only losses without a reference."""
        return self.settings.exists

    @property
    def own_engine(self) -> bool:
        """True if it has a DeepSpeed engine beside the policy's."""
        return self.settings.own_engine

    @property
    def has_weights(self) -> bool:
        """True if weights are kept for it, in an engine or an adapter."""
        return self.settings.has_weights

    @property
    def shares_policy(self) -> bool:
        """True if the policy's base weights, which must not be trained then, are the reference's."""
        return self.settings.shares_policy

    @property
    def before_training(self) -> bool:
        """True if it is asked once, before the policy is built, and is a table of log-probs afterwards."""
        return self.settings.before_training

    @property
    def sync(self) -> Sync | None:
        """How it moves towards the policy; None: it is frozen."""
        return getattr(self.settings, "sync", None)

    def describe(self) -> str:
        """The reference in a few words, without its engine."""
        return self.settings.describe(self.strategy, self.model.path, self.model.lora.path if self.model.lora else None)


def plan_reference(run: RunConfig) -> ReferencePlan:
    """The reference that a run asks for."""
    strategy = run.reference_strategy()
    settings = STRATEGIES[strategy].settings.of(run.reference)
    lora = run.model.lora
    continues = lora is not None and lora.path is not None and run.reference.adapter == "initial"
    moves = run.reference.sync is not None
    return ReferencePlan(
        strategy=strategy,
        settings=settings,
        model=_starting_model(run, keeps_adapter=continues),
        second_adapter=settings.shares_policy and (continues or moves),
    )


def _starting_model(run: RunConfig, *, keeps_adapter: bool) -> ModelConfig:
    """The model whose weights the reference starts from: another, or the policy's with its adapter, if any."""
    given = run.reference
    if given.path is not None:
        own = {"path": given.path, "revision": given.revision, "lora": None, "quantization": given.quantization}
        return run.model.model_copy(update=own)
    return run.model.model_copy(
        update={
            "revision": given.revision or run.model.revision,
            "lora": run.model.lora if keeps_adapter else None,
            "quantization": given.quantization or run.model.quantization,
        }
    )
