"""The reference's settings as a user writes them, and the strategies, each with only the settings that it takes.

`ReferenceConfig` is flat, with TRL's names. What a run works with is one of the dataclasses below it, in which a
combination that makes no sense cannot be written down. `STRATEGIES` registers them: a new strategy is a `Reference`
class and one line there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dsdpo.config.quantization import QuantizationConfig
from dsdpo.config.section import FolderText, PathText, Section
from dsdpo.console import every

AUTO = "auto"
SYNC_SETTINGS = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
InitialAdapter = Literal["initial", "base"]


@dataclass(frozen=True)
class Sync:
    """How a reference moves towards the policy: TR-DPO (arXiv 2404.09656)."""

    alpha: float  # share of the policy in the moved reference
    every: int  # optimizer steps between two moves


@dataclass(frozen=True)
class StrategySettings:
    """The settings of a strategy: each field is one of `ReferenceConfig`, `sync` stands for the three of `Sync`."""

    exists: ClassVar[bool] = True  # False: there is no reference
    own_engine: ClassVar[bool] = False  # a DeepSpeed engine beside the policy's, under a config of its own
    has_weights: ClassVar[bool] = True  # that are kept for it, in an engine or an adapter
    shares_policy: ClassVar[bool] = False  # the policy's base weights are the reference's
    before_training: ClassVar[bool] = False  # scored once, before the policy is built
    because: ClassVar[str] = ""  # why it takes no others, as a relative clause

    @classmethod
    def of(cls, given: ReferenceConfig) -> StrategySettings:
        """What the flat settings say of this strategy. Raises ValueError where they cannot be meant."""
        return cls(**{field.name: getattr(given, field.name) for field in fields(cls)})

    @classmethod
    def takes(cls) -> set[str]:
        """The flat settings that have an effect."""
        names = {field.name for field in fields(cls)}
        return names - {"sync"} | set(SYNC_SETTINGS) if "sync" in names else names

    def describe(self, strategy: str, model: str, adapter: str | None) -> str:
        """The reference in a few words, given the weights that it starts from."""
        return f"{model}{f' + adapter {adapter}' if adapter else ''}, {strategy}"


@dataclass(frozen=True)
class Separate(StrategySettings):
    """An inference-only engine, frozen or moving."""

    own_engine: ClassVar[bool] = True
    because: ClassVar[str] = "which asks an engine at each step"
    adapter: InitialAdapter
    path: str | None
    revision: str | None
    quantization: QuantizationConfig | None
    deepspeed: str | None
    score_tokens: int
    look_ahead_steps: int
    sync: Sync | None


@dataclass(frozen=True)
class Adapter(StrategySettings):
    """The policy's base weights, without adapter or with a second one, frozen or moving."""

    shares_policy: ClassVar[bool] = True
    because: ClassVar[str] = "whose weights are the policy's own"
    adapter: InitialAdapter
    score_tokens: int
    look_ahead_steps: int
    sync: Sync | None

    def describe(self, strategy: str, model: str, adapter: str | None) -> str:
        first = "with its first adapter, frozen" if adapter else "with adapters off"
        how = f"with an adapter that moves {every(self.sync.every, 'step')}" if self.sync else first
        return f"{model}, {strategy}: the policy's own weights {how}"


@dataclass(frozen=True)
class Precomputed(StrategySettings):
    """An engine that scores all pairs before training, and a table of its log-probs."""

    own_engine: ClassVar[bool] = True
    before_training: ClassVar[bool] = True
    because: ClassVar[str] = "which asks the reference once for all pairs, before training"
    adapter: InitialAdapter
    path: str | None
    revision: str | None
    quantization: QuantizationConfig | None
    deepspeed: str | None
    score_tokens: int
    store: str | None
    audit_rows: int


@dataclass(frozen=True)
class Snapshot(StrategySettings):
    """TR-DPO with α = 1: the policy scores the pairs of the next steps at each sync."""

    has_weights: ClassVar[bool] = False
    because: ClassVar[str] = "whose reference is the policy itself, which scores up to the next sync at once"
    score_tokens: int
    sync: Sync

    @classmethod
    def of(cls, given: ReferenceConfig) -> StrategySettings:
        if given.sync is None or given.sync.alpha != 1.0:
            raise ValueError(
                "reference.strategy policy_snapshot is TR-DPO with a whole copy at each sync: set "
                f"reference.sync_ref_model to true (now {_shown(given.sync_ref_model)}) and "
                f"reference.ref_model_mixup_alpha to 1 (now {given.ref_model_mixup_alpha}), or choose another strategy"
            )
        return super().of(given)

    def describe(self, strategy: str, model: str, adapter: str | None) -> str:
        return f"the policy as it is {every(self.sync.every, 'step')}: no weights of its own"


@dataclass(frozen=True)
class NoReference(StrategySettings):
    """For losses that have no reference in them: no engine, no log-probs."""

    exists: ClassVar[bool] = False
    has_weights: ClassVar[bool] = False
    because: ClassVar[str] = "under which there is no reference"

    def describe(self, strategy: str, model: str, adapter: str | None) -> str:
        return "none: the loss has no reference in it"


@dataclass(frozen=True)
class Strategy:
    """A strategy: the settings it takes and the class that does it."""

    settings: type[StrategySettings]
    reference: str  # `module:class`, imported when it is built: it imports torch, and --help need not wait for that


STRATEGIES: dict[str, Strategy] = {
    "separate": Strategy(Separate, "dsdpo.reference.separate:SeparateReference"),
    "adapter": Strategy(Adapter, "dsdpo.reference.adapter:AdapterReference"),
    "precomputed": Strategy(Precomputed, "dsdpo.reference.precomputed:PrecomputedReference"),
    "policy_snapshot": Strategy(Snapshot, "dsdpo.reference.snapshot:SnapshotReference"),
    "none": Strategy(NoReference, "dsdpo.reference.none:NoReference"),
}

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[(AUTO, *STRATEGIES)]


class ReferenceConfig(Section):
    """The reference model: whose weights, where they live and when they are asked."""

    strategy: StrategyName = AUTO
    """separate: its own inference-only engine; adapter: the policy's base weights, for model.lora; precomputed: an
    engine that scores all pairs before training and goes; policy_snapshot: TR-DPO with alpha 1 and no weights, where
    the policy scores for the next steps at each sync; none: no reference, for losses without one; auto: none for such a
    loss, else adapter if that fits the run, else separate."""
    adapter: InitialAdapter = "initial"
    """For a policy that goes on with an adapter. initial: the reference has that adapter, frozen; base: none."""
    path: PathText | None = None
    """Folder or Hub id of the reference; null: the model that the policy starts from."""
    revision: str | None = None
    """Hub branch, tag or commit of the reference; null: model.revision if the path is the policy's."""
    allow_other_tokenizer: bool = False
    """Take a reference whose tokenizer or number of embeddings is not the policy's."""
    quantization: QuantizationConfig | None = None
    """Hold the reference's weights in 4 bits, beside a policy in 16 or 32, or with bits 8 multiply in 8-bit floats;
    null: as the policy's base weights are. What that makes of its log-probs is printed."""
    deepspeed: PathText | None = None
    """DeepSpeed JSON of the reference engine (stage 0 or 3); null: derived from the policy's."""
    score_tokens: PositiveInt = 32768
    """Tokens in one scoring forward pass on one rank; a longer pair goes alone. Ranks that share a row
    (distributed.sequence_parallel) take as many times more in a pass."""
    look_ahead_steps: PositiveInt = 1
    """Optimizer steps whose pairs are scored together, never beyond a sync; pays if score_tokens holds them all."""
    sync_ref_model: bool = False
    """TR-DPO: move the reference towards the policy as training goes (arXiv 2404.09656)."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the policy in the moved reference; 1 copies it."""
    ref_model_sync_steps: PositiveInt = 512
    """Optimizer steps between two moves."""
    store: FolderText | None = None
    """Folder that precomputed log-probs are kept in and taken from; null: beside the prepared data (data.cache_dir)."""
    audit_rows: NonNegativeInt = 16
    """Pairs per data set that are scored again to check those found in the store; 0: none."""

    @property
    def sync(self) -> Sync | None:
        """How the reference moves; None: it does not."""
        return Sync(self.ref_model_mixup_alpha, self.ref_model_sync_steps) if self.sync_ref_model else None

    @property
    def is_default(self) -> bool:
        """True if nothing is asked of it."""
        return self.strategy == AUTO and not any(self._changed())

    @property
    def names_a_model(self) -> bool:
        """True if it is given weights or an engine config of its own."""
        return bool(self.path or self.revision or self.deepspeed or self.quantization)

    @model_validator(mode="after")
    def _has_effect(self) -> ReferenceConfig:
        for name in SYNC_SETTINGS[1:]:
            if not self.sync_ref_model and name in self._changed():
                raise ValueError(
                    f"reference.{name} {getattr(self, name)} has no effect while reference.sync_ref_model is false: "
                    "set that to true, or leave it out"
                )
        # auto stands for a strategy that takes no more than this one.
        settings = Separate if self.strategy == AUTO else STRATEGIES[self.strategy].settings
        for name in self._changed():
            if name not in settings.takes():
                others = [other for other, strategy in STRATEGIES.items() if name in strategy.settings.takes()]
                what = "moves the reference as training goes, and" if name == "sync_ref_model" else None
                raise ValueError(
                    f"reference.{name} {what or _shown(getattr(self, name))} has no effect with reference.strategy "
                    f"{self.strategy}{', ' + settings.because if settings.because else ''}: leave it out, or set "
                    f"reference.strategy to {' or '.join(others)}"
                )
        settings.of(self)
        return self

    def _changed(self) -> Iterator[str]:
        """Settings other than `strategy` that differ from their defaults."""
        for name, field in type(self).model_fields.items():
            if name != "strategy" and getattr(self, name) != field.default:
                yield name


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
