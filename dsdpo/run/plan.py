"""Everything that can go wrong before a model loads, cheapest first: files, DeepSpeed configs, tokenizer, data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from dsdpo.config.load import check_deepspeed_files
from dsdpo.config.reference_plan import ReferencePlan, plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.console import counted, launched
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.binning import LayoutName, longest_sequences
from dsdpo.data.plan import pairs_after
from dsdpo.data.prefetch import prefetch
from dsdpo.data.prompts import Prompt
from dsdpo.data.steps import BatchSource, StepBatches
from dsdpo.data.tokenize import cache_folder
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import all_or_none, gather_objects, local_rank, world_size
from dsdpo.engine.adapter_folder import check_adapter
from dsdpo.engine.build import start_distributed
from dsdpo.engine.elastic import check_ranks
from dsdpo.engine.load import refuse_on_device
from dsdpo.engine.trial import check_with_deepspeed
from dsdpo.engine.zero_config import (
    offload_device,
    own_reference_json,
    read_deepspeed_json,
    resolve_policy_config,
    resolve_reference_config,
)
from dsdpo.errors import ConfigError
from dsdpo.objective.packed_support import model_class, packed_refusal
from dsdpo.objective.router import Routing, routing_of
from dsdpo.run.agreement import agree
from dsdpo.run.datasets import prepare_windows, with_date
from dsdpo.run.inputs import check_inputs_stay
from dsdpo.run.model_checks import (
    check_heads,
    check_models,
    check_pairs_fit,
    check_rank,
    check_tokenizers,
    check_whole_models,
)
from dsdpo.run.prompts import fitting_prompts, read_prompts
from dsdpo.run_folder import RunFolder
from dsdpo.run_lock import holder
from dsdpo.sequence_group import ALONE, SequenceGroup, sequence_group
from dsdpo.training.cadence import Cadence
from dsdpo.training.mirrors import check_mirrors
from dsdpo.training.patience import check_metrics


@dataclass(frozen=True)
class Layout:
    """How batches are laid out for policy and reference, which get the same ones."""

    name: LayoutName
    why_padded: str | None = None  # None: they are packed


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check and whose data is ready."""

    run: RunConfig
    reference: ReferencePlan
    policy_config: dict[str, Any]  # DeepSpeed's, with nothing "auto" left
    reference_config: dict[str, Any]
    tokenizer: Tokenizer
    train: BatchSource
    evaluation: BatchSource | None
    total_steps: int  # of the whole run
    layout: Layout
    run_file: str  # as errors name it
    hidden_size: int  # of the policy
    prompts: tuple[Prompt, ...] = ()  # that the models answer as training goes
    sequence: SequenceGroup = ALONE  # the ranks that share this rank's rows
    routing: Routing | None = None  # what is asked of the policy's routers; None: it has none
    start_step: int = 0  # where training starts, which a resumed run does not at 0
    start_pairs: int = 0  # pairs that have been trained on by then

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one response, of all the run's data."""
        parts = [source for source in (self.train, self.evaluation) if source is not None]
        return max(int(longest_sequences(source.pairs.lengths).max()) for source in parts)

    def training_windows(self, device: torch.device, step: int = 0) -> Generator[StepBatches, None, None]:
        """This rank's windows of the steps after `step`, made ahead of time; `step` is `start_step` or later."""
        left, depth = self.total_steps - step, 1 + self.run.reference.look_ahead_steps
        if self.run.train.overfit_first_step:
            return prefetch(repeat(next(self._steps(0, count=1)), left), device, depth=depth)
        consumed_pairs = pairs_after(
            step - self.start_step,
            start=self.start_pairs,
            num_pairs=len(self.train.pairs),
            pairs_per_step=self.run.batch.pairs_per_step,
        )
        return prefetch(self._steps(consumed_pairs, count=left), device, depth=depth)

    def _steps(self, consumed_pairs: int, *, count: int) -> Iterator[StepBatches]:
        return self.train.steps(
            consumed_pairs=consumed_pairs,
            steps=count,
            pairs_per_step=self.run.batch.pairs_per_step,
            seed=self.run.train.seed,
            shuffle=self.run.data.shuffle,
        )

    def held_out_windows(self, device: torch.device) -> Iterable[tuple[PreferenceBatch, ...]]:
        """This rank's windows of one evaluation, made ahead of time; none without held-out data."""
        return prefetch(self.evaluation.whole_pass(), device) if self.evaluation else ()

    @property
    def store_folder(self) -> Path:
        """Where precomputed log-probs are kept."""
        return store_folder(self.run)

    def evaluates_after(self, step: int) -> bool:
        """True if held-out pairs are scored after `step`; 0 is the start."""
        due = Cadence.of(self.run, self.total_steps)
        return self.evaluation is not None and step <= self.total_steps and due.evaluate(step)


def plan_run(run: RunConfig, *, run_file: str | Path = "the run", writes_output: bool = True) -> Plan:
    """Check the whole run and tokenize its data, once per node. Collective; no model is loaded.

    `run_file` is named where the run and a DeepSpeed JSON contradict each other. Raises `ConfigError` or `DataError`,
    on all ranks alike.
    """
    ranks = check_ranks(run.distributed, launched())  # who does not know which of many it is can do nothing right
    if ranks > 1:  # what one rank alone finds wrong, all must learn of
        start_distributed(timeout_minutes=run.distributed.timeout_minutes)
    with all_or_none():
        reference, models, layout, tokenizer = check_inputs(run, run_file, ranks=ranks, writes_output=writes_output)
    start_distributed(timeout_minutes=run.distributed.timeout_minutes)
    agree(run, tokenizer, models)
    model = models["model.path"].get_text_config()
    hidden_size = int(model.hidden_size)
    routing = routing_of(model_class(models["model.path"]), model, run.model.router_aux_loss_coef)
    configs = shared_configs(run, run_file, hidden_size=hidden_size, total_steps=None)
    ask_deepspeed(run, configs)
    refuse_on_device(run.model)
    with all_or_none():
        if local_rank() == 0:
            check_whole_models(run, reference.model, layout=layout.name, policy_config=configs[0])
    prompt_rows = read_prompts(run)
    run = with_date(run, tokenizer)
    sequence = sequence_group(run.distributed.sequence_parallel)
    # The smaller part first: its mistakes are not worth waiting for the larger one.
    prepare = partial(prepare_windows, run, tokenizer=tokenizer, model=model, layout=layout.name, sequence=sequence)
    evaluation = prepare(run.data.eval, "test") if run.data.eval else None
    train = prepare(run.data.train, "train")
    check_pairs_fit(run, tokenizer, models, (train, evaluation))
    if evaluation is not None:
        check_metrics(run, evaluation.pairs)
        evaluation = replace(evaluation, first_pair_id=len(train.pairs))
    total_steps = run.total_steps(len(train.pairs))
    policy_config, reference_config = shared_configs(run, run_file, hidden_size=hidden_size, total_steps=total_steps)
    return Plan(
        run,
        reference,
        policy_config,
        reference_config,
        tokenizer,
        train,
        evaluation,
        total_steps,
        layout,
        str(run_file),
        hidden_size,
        fitting_prompts(prompt_rows, run, tokenizer, train.pairs, model),
        sequence,
        routing,
    )


def check_inputs(
    run: RunConfig, run_file: str | Path, *, ranks: int, writes_output: bool
) -> tuple[ReferencePlan, dict[str, Any], Layout, Tokenizer]:
    """What this rank sees of a run's inputs, checked: reference, models' configurations, layout and tokenizer.

    Not collective. Raises `ConfigError` or `DataError`.
    """
    reference = plan_reference(run)
    models = check_models(run, reference.model)
    layout = choose_layout(run, models)
    check_split(run, layout, models, ranks=ranks)
    check_adapter(run, trains_biases=not reference.shares_policy)
    if writes_output:
        check_output_folder(run)
        check_inputs_stay(run, run_file)
    if reference.before_training:
        check_store(store_folder(run))
    hidden_size = int(models["model.path"].get_text_config().hidden_size)
    check_rank(run.model, hidden_size)
    policy_config, _ = resolve_configs(run, run_file, hidden_size=hidden_size, total_steps=None, ranks=ranks)
    check_background(run, policy_config)
    tokenizer = load_tokenizer(run.model)
    check_tokenizers(run, reference.model, tokenizer, models)
    return reference, models, layout, tokenizer


def with_total_steps(plan: Plan, total_steps: int) -> Plan:
    """The plan with another length, which a schedule in the DeepSpeed JSON follows. Collective."""
    if total_steps == plan.total_steps:
        return plan
    policy_config, _ = shared_configs(plan.run, plan.run_file, hidden_size=plan.hidden_size, total_steps=total_steps)
    return replace(plan, total_steps=total_steps, policy_config=policy_config)


def choose_layout(run: RunConfig, models: dict[str, PretrainedConfig]) -> Layout:
    """The layout of all batches. `models`: settings to Hugging Face configurations.

    Policy and reference get the same batches, so both must be able to take them. Raises `ConfigError` where packed is
    asked for and cannot be.
    """
    if run.data.layout == "padded":
        return Layout("padded", "data.layout asks for it")
    for key, config in models.items():
        refusal = packed_refusal(config, run.model.attn_implementation)
        if refusal and run.data.layout == "packed":
            raise ConfigError(f"data.layout: packed, but {refusal} ({key}); set data.layout to auto or padded")
        if refusal:
            return Layout("padded", refusal)
    return Layout("packed")


def check_split(run: RunConfig, layout: Layout, models: dict[str, PretrainedConfig], *, ranks: int) -> None:
    """Raise `ConfigError` unless rows can be split over as many ranks as the run asks for; `models` as above."""
    size = run.distributed.sequence_parallel
    if size == 1:
        return
    if ranks % size:
        raise ConfigError(
            f"distributed.sequence_parallel: {size} ranks are to share each row, but this run has "
            f"{counted(ranks, 'rank')}: start a multiple of {size} (deepspeed --num_gpus {size}, torchrun "
            f"--nproc_per_node {size}), or set it to a divisor of {ranks}"
        )
    if layout.why_padded:
        raise ConfigError(
            f"distributed.sequence_parallel: {size} ranks can share packed rows only, and {layout.why_padded}: leave "
            "it out, or train another model"
        )
    check_heads(models, size)


def check_background(run: RunConfig, policy_config: dict[str, Any]) -> None:
    """Raise `ConfigError` where the run asks for what cannot be saved in the background."""
    if run.checkpoint.background is True and offload_device(policy_config, "optimizer") == "nvme":
        raise ConfigError(
            f"checkpoint.background: true, but {run.deepspeed} has zero_optimization.offload_optimizer.device nvme, "
            "whose states are copied from disk to disk: set it to auto or false"
        )


def store_folder(run: RunConfig) -> Path:
    """Where precomputed log-probs are kept; each reference has a folder of its own in it."""
    return Path(run.reference.store).expanduser() if run.reference.store else cache_folder(run.data) / "reference"


def check_store(folder: Path) -> None:
    """Raise `ConfigError` unless precomputed log-probs can be kept in `folder`, which need not be there yet."""
    existing = nearest_existing(folder)
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ConfigError(
            f"reference.store: {folder} cannot be written: {existing} is no folder that files can be made in "
            f"({error.strerror}); give a folder that can"
        ) from error


def nearest_existing(path: Path) -> Path:
    """The path itself, or what there is of the folders above it."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.exists())


def shared_configs(
    run: RunConfig, run_file: str | Path, *, hidden_size: int, total_steps: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The DeepSpeed configs of policy and reference, complete and the same on all ranks. Collective."""
    of_nodes = set(gather_objects(launched().local_size))  # a node may have fewer ranks than others
    per_node = of_nodes.pop() if len(of_nodes) == 1 else 1
    return resolve_configs(
        run, run_file, hidden_size=hidden_size, total_steps=total_steps, ranks=world_size(), per_node=per_node
    )


def resolve_configs(
    run: RunConfig,
    run_file: str | Path,
    *,
    hidden_size: int,
    total_steps: int | None,
    ranks: int,
    per_node: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The DeepSpeed configs of policy and reference, complete, for so many ranks, of which `per_node` on a node."""
    check_deepspeed_files(run)
    raw = read_deepspeed_json(run.deepspeed)
    policy = resolve_policy_config(
        raw,
        source=run.deepspeed,
        run=run,
        world_size=ranks,
        hidden_size=hidden_size,
        total_steps=total_steps,
        run_source=run_file,
        per_node=per_node,
    )
    own = run.reference.deepspeed
    raw_reference = read_deepspeed_json(own) if own else None
    reference = resolve_reference_config(
        own_reference_json(raw_reference, raw, own),
        policy_config=policy,
        source=own,
        run=run,
        world_size=ranks,
        hidden_size=hidden_size,
        run_source=run_file,
    )
    return policy, reference


def ask_deepspeed(run: RunConfig, configs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Raise `ConfigError` for configs of policy and reference that DeepSpeed itself refuses. Collective."""
    policy, reference = configs
    check_with_deepspeed(policy, source=run.deepspeed, trains=True)
    if plan_reference(run).own_engine:
        source = run.reference.deepspeed or f"{run.deepspeed}, from which the reference's is derived"
        check_with_deepspeed(reference, source=source, trains=False)


def check_output_folder(run: RunConfig) -> None:
    """Raise `ConfigError` unless the run may write into its output folder, and has what it writes with."""
    check_mirrors(run)
    folder = Path(run.output_dir)
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"output_dir: {folder} cannot be written: {existing} is no folder that this user may write to; "
            "choose another"
        )
    files = RunFolder(folder)
    if (user := holder(files)) is not None:
        raise ConfigError(
            f"output_dir: {folder} is in use by {user}: wait until that run is done, or choose another folder"
        )
    used = folder.exists() and any(path != files.lock for path in folder.iterdir())
    if used and not run.overwrite_output_dir and not run.checkpoint.resume:
        raise ConfigError(
            f"output_dir: {folder} is not empty; choose another folder, add --resume auto to go on with the run in it, "
            "or --overwrite_output_dir true to replace it"
        )
