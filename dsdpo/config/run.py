"""What a run is: every setting with its type, default, unit and limits, checked without importing torch.

The names are a contract. Fields with a counterpart in TRL or transformers carry its name and meaning.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dsdpo.config.data import DataConfig
from dsdpo.config.durations import Duration, PositiveDuration
from dsdpo.config.evaluation import EvaluationConfig, HeldOutMetric
from dsdpo.config.loss import LOSSES, LossConfig, listed
from dsdpo.config.model import ModelConfig
from dsdpo.config.optimizer import OptimizerConfig
from dsdpo.config.reference import AUTO, STRATEGIES, ReferenceConfig
from dsdpo.config.section import FolderText, PathText, Section


class BatchConfig(Section):
    """How many pairs make a step, and how they are cut into micro-batches."""

    pairs_per_step: PositiveInt = 64
    """Pairs per optimizer step over all ranks together, whatever their number."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Token budget of one forward/backward on one rank, as data.layout lays them out: packed, both responses and their
    prompt once; padded, padding included. A longer pair goes alone. With distributed.sequence_parallel ranks share a
    row, which then holds as many times the budget."""
    pairs_per_micro_batch: PositiveInt | None = None
    """Fixed number of pairs of one forward/backward on one rank, in place of the token budget."""

    @model_validator(mode="after")
    def _fits(self) -> BatchConfig:
        if self.pairs_per_micro_batch and self.pairs_per_micro_batch > self.pairs_per_step:
            raise ValueError(
                f"batch.pairs_per_micro_batch {self.pairs_per_micro_batch} is more than "
                f"batch.pairs_per_step {self.pairs_per_step}: a micro-batch is a part of a step"
            )
        return self


class TrainConfig(Section):
    """How long to train, and the seed."""

    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Passes over the training pairs; fractions are allowed."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Optimizer steps, in place of num_train_epochs; -1: as many as the epochs take."""
    seed: NonNegativeInt = 42
    """Decides data order, weighted samples and every other random choice."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite is never taken: stop the run there, or skip it and go on."""
    max_skipped_steps: PositiveInt = 10
    """Steps in a row that on_nonfinite skip may leave out before the run ends with an error."""
    overfit_first_step: bool = False
    """Train every step on the pairs of the first one: a loss that does not go to 0 shows a fault."""

    @model_validator(mode="after")
    def _trains(self) -> TrainConfig:
        if self.max_steps == 0:
            raise ValueError("train.max_steps 0 would train nothing: give the number of steps, or -1 for all epochs")
        return self


class CheckpointConfig(Section):
    """What is kept so that a run can go on."""

    every_steps: NonNegativeInt = 100
    """Optimizer steps between checkpoints; 0: none."""
    background: bool | Literal["auto"] = "auto"
    """Write checkpoints while training goes on, from a copy of their state in host memory. auto: where the copies of a
    host's ranks take at most half of the host memory that is free; the last one of a run is written at once."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; older ones are deleted once a newer one is whole."""
    keep_best: NonNegativeInt = 0
    """Besides, keep as many with the best best_metric; needs an evaluation at each checkpoint."""
    best_metric: HeldOutMetric = "eval/loss"
    """The held-out metric of keep_best, as metrics.jsonl names it: of losses, nll, perplexity, ties, drift and
    calibration_error the lowest is best, of all others the highest."""
    save_attempts: PositiveInt = 5
    """Failures to save in a row, as on a full disk, before the run ends; training goes on between attempts."""
    save_pause: Duration = timedelta(seconds=30)
    """Time between attempts to save after the last step or before stopping, as HH:MM:SS or seconds."""
    resume: FolderText | None = None
    """auto: go on from the newest whole checkpoint in output_dir, from the start if there is none; or one's path."""
    allow_changes: tuple[str, ...] = ()
    """Settings, by dotted name, that may differ from the checkpoint's although they change the mathematics."""
    allow_other_reference: bool = False
    """Resume although the reference is not the checkpoint's. Recorded in identity.json."""
    deadline: PositiveDuration | None = None
    """Time from the start, as HH:MM:SS, D-HH:MM:SS or seconds, after which to save and stop before the next step."""
    time_limit: PositiveDuration | None = None
    """Time from the start, written likewise, after which the process is ended from outside: the run stops early enough
    to be saved by then, by how long steps and saves have taken. launch/slurm.sbatch gives what its job has left."""

    @model_validator(mode="after")
    def _has_time(self) -> CheckpointConfig:
        if self.time_limit is not None and self.deadline is not None and self.deadline >= self.time_limit:
            raise ValueError(
                f"checkpoint.deadline {self.deadline} is not before checkpoint.time_limit {self.time_limit}, when the "
                "process is ended: leave the deadline out, or give an earlier one"
            )
        return self


class ExportConfig(Section):
    """What the trained policy is written as."""

    which: Literal["last", "best"] = "last"
    """last: the weights after the last step; best: those of the checkpoint with the best checkpoint.best_metric."""
    merge_adapter: bool = False
    """Beside the adapter in model/, write the base model with the adapter merged into it to merged/."""
    push_to_hub: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")] | None = None
    """Hub repository, USER/NAME, that model/ is uploaded to once it is written; null: nothing leaves this machine."""
    hub_private: bool = True
    """Whether a repository that the upload makes is private."""


class WandbConfig(Section):
    """Weights & Biases, beside metrics.jsonl."""

    project: str | None = None
    """Project name; null: WANDB_PROJECT, else dsdpo."""
    entity: str | None = None
    """User or team; null: WANDB_ENTITY, else the account's default."""
    name: str | None = None
    """Run name; null: WANDB_NAME, else the name of output_dir, or of the folder around one called output."""
    group: str | None = None
    """Group of runs shown together; null: WANDB_RUN_GROUP."""
    tags: list[str] = Field(default=[])
    """Labels of the run; none: WANDB_TAGS."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """online sends as the run goes, offline writes files to send later, disabled does neither; null: WANDB_MODE, else
    online where this machine is logged in."""


def _in_order(steps: tuple[int, int] | None) -> tuple[int, int] | None:
    if steps is not None and steps[0] > steps[1]:
        raise ValueError(f"tracking.profile_steps {list(steps)}: give the first step, then the last")
    return steps


class TrackingConfig(Section):
    """What is recorded while training."""

    every_steps: PositiveInt = 1
    """Optimizer steps between rows of metrics.jsonl, each averaged over those steps."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases; null: no."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder; needs the package tensorboard."""
    names: Literal["dsdpo", "trl"] = "dsdpo"
    """What W&B and TensorBoard call metrics; trl: as TRL's reports do, train/loss and train/global_step."""
    inspected_rows: NonNegativeInt = 0
    """Training pairs, of all lengths, whose text W&B and TensorBoard show as it is trained on; 0: none leaves here."""
    peak_tflops: PositiveFloat | None = None
    """What one device can do at most, in TFLOP/s of 16-bit matrix products, for perf/mfu; null: known by its name."""
    pairs: bool = True
    """Write each step's pair ids to pairs.jsonl."""
    profile_steps: Annotated[tuple[PositiveInt, PositiveInt] | None, AfterValidator(_in_order)] = None
    """First and last step, such as [10, 13], that torch.profiler traces into profile/ of the run folder; null: none."""
    entropy: bool = False
    """Also record the mean entropy of the policy's next-token distribution over the responses, in nats."""
    hints: bool = True
    """Say once what a run's metrics or data suggest, with the page of the docs that explains it."""

    @model_validator(mode="after")
    def _names_have_effect(self) -> TrackingConfig:
        if self.wandb is not None or self.tensorboard:
            return self
        if self.inspected_rows:
            raise ValueError(
                f"tracking.inspected_rows {self.inspected_rows} has no effect without tracking.wandb or "
                "tracking.tensorboard: set one of them, or use dsdpo inspect"
            )
        if self.names != "dsdpo":
            raise ValueError(
                f"tracking.names {self.names} has no effect without tracking.wandb or tracking.tensorboard, as "
                "metrics.jsonl has our names always: set one of them, or leave it out"
            )
        return self


MOST_TILES = 1024  # of a micro-batch's MLPs
SHORTEST_SILENCE = timedelta(seconds=5)


class DistributedConfig(Section):
    """How ranks work together."""

    timeout_minutes: Annotated[float, Field(ge=0.1, le=60 * 24 * 365)] = 30
    """Minutes a collective may wait for the other ranks before the run fails."""
    lost_after: PositiveDuration = timedelta(minutes=3)
    """Time without a sign of life, as HH:MM:SS or seconds, after which a rank is taken for lost and the others end."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share the tokens of each packed row, for pairs too long for one; divides ranks and attention heads."""
    min_ranks: PositiveInt = 1
    """Fewest ranks to train with. With fewer, a run under torchrun elastic waits for nodes to join, any other is
    refused."""

    @model_validator(mode="after")
    def _signs_come_sooner(self) -> DistributedConfig:
        if self.lost_after < SHORTEST_SILENCE:
            raise ValueError(
                f"distributed.lost_after {self.lost_after} is less than ranks can promise, who give a sign of life "
                f"each second: give {SHORTEST_SILENCE} or more"
            )
        return self


class RunConfig(Section):
    """One run of dsdpo, whole."""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()
    distributed: DistributedConfig = DistributedConfig()
    deepspeed: PathText
    """DeepSpeed JSON of the policy engine."""
    output_dir: FolderText
    """Folder for everything the run writes."""
    overwrite_output_dir: bool = False
    """Write into output_dir even if it is not empty."""

    @model_validator(mode="after")
    def _adapter_fits(self) -> RunConfig:
        lora, reference = self.model.lora, self.reference
        if lora is None and (reference.strategy == "adapter" or reference.adapter != "initial"):
            key = "strategy adapter" if reference.strategy == "adapter" else f"adapter {reference.adapter}"
            raise ValueError(f"reference.{key} needs an adapter to train: set model.lora, or leave it out")
        if lora is None and self.export.merge_adapter:
            raise ValueError("export.merge_adapter true has nothing to merge without model.lora: leave it out")
        if lora is not None and lora.bias != "none" and reference.strategy == "adapter":
            raise ValueError(
                f"model.lora.bias {lora.bias} trains biases of the base model, which is the reference under "
                "reference.strategy adapter: set model.lora.bias to none or reference.strategy to separate"
            )
        if reference.quantization and self.model.torch_compile:
            raise ValueError("reference.quantization and model.torch_compile do not go together: leave one of them out")
        quantized = reference.quantization or (self.model.quantization if reference.path is None else None)
        in_4_bits = quantized is not None and quantized.bits == 4
        if reference.sync_ref_model and in_4_bits and STRATEGIES[self.reference_strategy()].settings.own_engine:
            key = "reference.quantization" if reference.quantization else "model.quantization"
            raise ValueError(
                f"reference.sync_ref_model moves the reference's weights, which {key} holds in 4 bits: "
                + (
                    "leave it out"
                    if reference.quantization
                    else "set reference.strategy to adapter, whose adapter moves"
                )
            )
        if reference.adapter == "base" and reference.sync_ref_model and self.reference_strategy() == "adapter":
            raise ValueError(
                "reference.sync_ref_model moves the reference's adapter, of which reference.adapter base has none: set "
                "reference.adapter to initial"
            )
        return self

    @model_validator(mode="after")
    def _loss_has_its_reference(self) -> RunConfig:
        strategy = STRATEGIES[self.reference_strategy()].settings
        if not strategy.exists and self.loss.reference_use == "needed":
            without = [name for name, kind in LOSSES.items() if kind.reference != "needed"]
            raise ValueError(
                f"reference.strategy {self.reference.strategy} leaves no reference to compare with, which loss.type "
                f"{' + '.join(self.loss.types)} needs: choose another strategy, or set loss.type to {listed(without)}"
            )
        if not strategy.exists and self.loss.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"loss.f_divergence_type {self.loss.f_divergence_type} is a divergence from the reference, of which "
                f"reference.strategy {self.reference.strategy} leaves none: set it to reverse_kl, or choose another "
                "strategy"
            )
        return self

    @model_validator(mode="after")
    def _tiles_are_few(self) -> RunConfig:
        tile, tokens = self.model.mlp_tile_tokens, self.batch.tokens_per_micro_batch
        if tile is not None and tokens > MOST_TILES * tile:
            raise ValueError(
                f"model.mlp_tile_tokens {tile} cuts the batch.tokens_per_micro_batch {tokens} of a micro-batch into "
                f"{math.ceil(tokens / tile)} parts, each one more pass through every MLP: give "
                f"{math.ceil(tokens / MOST_TILES)} or more, such as {max(256, math.ceil(tokens / 16))}"
            )
        return self

    @model_validator(mode="after")
    def _row_can_be_split(self) -> RunConfig:
        size = self.distributed.sequence_parallel
        if size > 1 and self.data.layout == "padded":
            raise ValueError(
                f"distributed.sequence_parallel {size} splits packed rows, of which data.layout padded has none: set "
                "data.layout to auto, or leave sequence_parallel out"
            )
        if size > 1 and self.model.torch_compile:
            raise ValueError(
                f"distributed.sequence_parallel {size} and model.torch_compile do not go together: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> RunConfig:
        if self.export.which == "best" and not self.checkpoint.keep_best:
            raise ValueError(
                "export.which best exports the best checkpoint, of which checkpoint.keep_best 0 keeps none: set that "
                "to 1 or more, or export.which to last"
            )
        if self.evaluation.patience is not None and not self.data.eval:
            raise ValueError(
                f"evaluation.patience {self.evaluation.patience} has nothing to go by: set data.eval, or leave it out"
            )
        saved, evaluated = self.checkpoint.every_steps, self.evaluation.every_steps
        if self.checkpoint.keep_best and not (self.data.eval and evaluated and saved and saved % evaluated == 0):
            raise ValueError(
                f"checkpoint.keep_best {self.checkpoint.keep_best} needs an evaluation at each checkpoint: set "
                f"data.eval, and checkpoint.every_steps ({saved}) to a multiple of evaluation.every_steps ({evaluated})"
            )
        return self

    def reference_strategy(self) -> str:
        """The strategy as asked for, or what `auto` stands for."""
        if self.reference.strategy != AUTO:
            return self.reference.strategy
        if self.loss.reference_use == "unused" and self.reference.is_default:
            return "none"
        lora = self.model.lora
        shared = lora is not None and lora.bias == "none" and not self.reference.names_a_model
        return "adapter" if shared else "separate"

    def total_steps(self, num_pairs: int) -> int:
        """Optimizer steps of the whole run over `num_pairs` training pairs; an epoch's last step may be smaller."""
        if self.train.max_steps > 0:
            return self.train.max_steps
        size = self.batch.pairs_per_step
        epochs, rest = divmod(round(self.train.num_train_epochs * num_pairs), num_pairs)
        return max(1, epochs * math.ceil(num_pairs / size) + math.ceil(rest / size))
