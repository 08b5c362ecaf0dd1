"""From a run's settings to its forecast: without devices, weights or, where lengths are given, data."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdpo.config.reference_plan import ReferencePlan, plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.console import launched
from dsdpo.data.pairs import open_pairs
from dsdpo.data.tokenize import prepare_pairs
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.engine.adapter_folder import check_adapter
from dsdpo.engine.zero_config import (
    Config,
    own_reference_json,
    read_deepspeed_json,
    resolve_policy_config,
    resolve_reference_config,
)
from dsdpo.errors import ConfigError, DataError
from dsdpo.estimate.forecast import Forecast, Job, forecast
from dsdpo.estimate.hardware import gpu_called, hardware
from dsdpo.estimate.seconds import Machine
from dsdpo.estimate.weights import Blank, blank_model
from dsdpo.estimate.workload import workload
from dsdpo.run.datasets import with_date
from dsdpo.run.model_checks import check_models, check_rank
from dsdpo.run.plan import Layout, Plan, check_split, choose_layout


@dataclass(frozen=True)
class Subject:
    """A run that forecasts are made of, with the parts that do not depend on DeepSpeed JSONs."""

    run: RunConfig
    run_file: str
    reference: ReferencePlan
    layout: Layout
    hidden_size: int
    policy: Blank
    scorer: Blank  # the reference's model; the policy's where it has none of its own
    lengths: np.ndarray  # (n, 1 + responses) tokens of the run's pairs, or of one like them


def subject_of(run: RunConfig, run_file: str | Path, *, tokens: tuple[int, ...] | None, ranks: int) -> Subject:
    """The run with its models on the meta device; `tokens` of prompt, chosen and rejected stand for its data.

    Raises `ConfigError` or `DataError`.
    """
    reference = plan_reference(run)
    models = check_models(run, reference.model, weights=False)
    hidden_size = int(models["model.path"].get_text_config().hidden_size)
    layout = choose_layout(run, models)
    check_split(run, layout, models, ranks=ranks)
    check_adapter(run, trains_biases=not reference.shares_policy)
    check_rank(run.model, hidden_size)
    lengths = np.array([tokens]) if tokens else lengths_of(run)
    return with_models(run, run_file, lengths=lengths, layout=layout, hidden_size=hidden_size)


def with_models(
    run: RunConfig, run_file: str | Path, *, lengths: np.ndarray, layout: Layout, hidden_size: int
) -> Subject:
    """The run, whose layout and lengths are known, with its models on the meta device."""
    reference = plan_reference(run)
    policy = blank_model(run.model, layout=layout.name, trains=True, second_adapter=reference.second_adapter)
    scorer = policy
    if reference.own_engine:
        key = "reference.path" if run.reference.path else "model.path"
        scorer = blank_model(reference.model, layout=layout.name, trains=False, key=key)
    return Subject(run, str(run_file), reference, layout, hidden_size, policy, scorer, lengths)


def lengths_of(run: RunConfig) -> np.ndarray:
    """(n, 1 + responses) tokens of the run's training pairs, which are prepared if they are not.

    Raises `ConfigError` or `DataError` that says how to do without them.
    """
    try:
        tokenizer = load_tokenizer(run.model)
        run = with_date(run, tokenizer)
        folder = prepare_pairs(run.data.train, tokenizer, data=run.data, seed=run.train.seed, default_split="train")
        return np.asarray(open_pairs(folder).lengths)
    except (ConfigError, DataError) as error:
        raise type(error)(
            f"{error}\nTo estimate without tokenizer and data, give lengths: --tokens PROMPT,CHOSEN,REJECTED, such as "
            "--tokens 512,256,256"
        ) from error


def job_of(subject: Subject, machine: Machine, configs: tuple[Config, Config]) -> Job:
    """The run under two resolved DeepSpeed configs on a machine."""
    return Job(
        run=subject.run,
        reference=subject.reference,
        policy_config=configs[0],
        reference_config=configs[1],
        policy=subject.policy,
        scorer=subject.scorer,
        work=workload(subject.run, subject.lengths, subject.layout.name),
        machine=machine,
    )


def resolved(
    subject: Subject, policy: Config, reference: Config | None, *, ranks: int, per_node: int
) -> tuple[Config, Config]:
    """The configs of both engines from the content of JSONs; without a reference's it is derived. See `plan.py`."""
    run = subject.run
    ours = resolve_policy_config(
        policy,
        source=run.deepspeed,
        run=run,
        world_size=ranks,
        hidden_size=subject.hidden_size,
        total_steps=None,
        run_source=subject.run_file,
        per_node=per_node,
    )
    own = run.reference.deepspeed
    theirs = resolve_reference_config(
        own_reference_json(reference, policy, own),
        policy_config=ours,
        source=own,
        run=run,
        world_size=ranks,
        hidden_size=subject.hidden_size,
        run_source=subject.run_file,
    )
    return ours, theirs


def with_files(subject: Subject, policy: str | None, reference: str | None) -> Subject:
    """The run with other DeepSpeed JSONs; None leaves one as it is."""
    run = subject.run
    if policy is not None:
        run = run.model_copy(update={"deepspeed": policy})
    if reference is not None:
        run = run.model_copy(update={"reference": run.reference.model_copy(update={"deepspeed": reference})})
    return replace(subject, run=run)


def forecast_of(subject: Subject, machine: Machine) -> Forecast:
    """The run's forecast under the DeepSpeed JSONs that it names."""
    return forecast(job_of(subject, machine, configs_of(subject, machine)))


def forecast_of_plan(plan: Plan) -> tuple[Forecast, Machine]:
    """What a planned run takes on the ranks that were started, on machines like this one."""
    subject = with_models(
        plan.run,
        plan.run_file,
        lengths=np.asarray(plan.train.pairs.lengths),
        layout=plan.layout,
        hidden_size=plan.hidden_size,
    )
    started = launched()
    machine = this_machine(ranks=started.world_size, per_node=started.local_size)
    return forecast(job_of(subject, machine, (plan.policy_config, plan.reference_config))), machine


def configs_of(subject: Subject, machine: Machine) -> tuple[Config, Config]:
    """Both configs, from the JSONs that the run names."""
    own = subject.run.reference.deepspeed
    raw: tuple[Config, Any] = (
        read_deepspeed_json(subject.run.deepspeed),
        read_deepspeed_json(own) if own and subject.reference.own_engine else None,
    )
    return resolved(subject, *raw, ranks=machine.ranks, per_node=machine.per_node)


def this_machine(*, ranks: int, per_node: int, host_memory: float | None = None) -> Machine:
    """Ranks on machines like this one: its GPU by name, else its CPUs and memory.

    A GPU that the table does not have is taken to be as fast as an A100, and named so.
    """
    per_node = min(per_node, ranks)
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return Machine(hardware("cpu", ranks_per_node=per_node), ranks, per_node)
    name = torch.cuda.get_device_name()
    memory = float(torch.cuda.get_device_properties().total_memory)
    known = gpu_called(name)
    if known is None:
        known, name = hardware("a100", ranks_per_node=per_node), f"{name}, speed of an A100"
    host = host_memory or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Machine(replace(known, name=name, memory=memory), ranks, per_node, host)
