"""What to change in a run that does not fit, the smallest change first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsdpo.config.lora import LoraConfig
from dsdpo.config.run import RunConfig
from dsdpo.data.binning import COSTS
from dsdpo.engine.zero_config import Config, read_deepspeed_json
from dsdpo.errors import ConfigError
from dsdpo.estimate.forecast import Forecast, forecast
from dsdpo.estimate.seconds import Machine
from dsdpo.objective.output_head import base_lm
from dsdpo.objective.tiles import mlps_of
from dsdpo.run.estimate import Subject, job_of, resolved, with_models

MOST_RANKS = 4096
LONG = 8192  # tokens of a pair from which on it is worth a row of its own to split or to tile
SHOWN = 3  # changes that are named where several would do alone
CPU = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True)
class Trial:
    """A run, the content of its DeepSpeed JSONs and its machine, as changed so far."""

    subject: Subject
    policy: Config
    reference: Config | None
    machine: Machine

    def forecast(self) -> Forecast:
        """Raises `ConfigError` where DeepSpeed or dsdpo refuse it."""
        machine = self.machine
        configs = resolved(self.subject, self.policy, self.reference, ranks=machine.ranks, per_node=machine.per_node)
        return forecast(job_of(self.subject, self.machine, configs))


Change = tuple[str, Trial]  # in words, and the run with it
Step = Callable[[Trial], Iterator[Change]]
Choice = tuple[Step, int]  # a step, and which of its offers


@dataclass(frozen=True)
class Advice:
    """Changes, to be made together, after which the run fits."""

    changes: tuple[str, ...]
    forecast: Forecast


def advise(subject: Subject, machine: Machine) -> list[Advice]:
    """What makes the run fit: single changes that do, else the first ones of the list that do together.

    Empty where nothing does.
    """
    run, own = subject.run, subject.run.reference.deepspeed
    raw = read_deepspeed_json(own) if own and subject.reference.own_engine else None
    start = Trial(subject, read_deepspeed_json(run.deepspeed), raw, machine)
    alone = []
    for step in STEPS:
        for words, trial in _offers(step, start):
            found = _tried(trial)
            if found is not None and found.fits:
                alone.append(Advice((words,), found))
                break
        if len(alone) == SHOWN:
            break
    return alone or _together(start)


def _together(start: Trial) -> list[Advice]:
    """Changes of the list one on top of the other until the run fits, then without those that it fits without.

    Of a step that offers several, such as ever smaller micro-batches, the first with which it fits is taken.
    """
    chosen, found = list[Choice](), _tried(start)
    for step in STEPS:
        best: Choice | None = None
        for number, (_, changed) in enumerate(_offers(step, _made(start, chosen)[1])):
            after = _tried(changed)
            if after is not None and (found is None or _frees(found, after)):
                best, found = (step, number), after
                if after.fits:
                    return [_pruned(start, [*chosen, best])]
        chosen += [best] if best else []
    return []


def _pruned(start: Trial, chosen: list[Choice]) -> Advice:
    """The same without what it fits without, the largest changes first, and with the first offer that will do."""
    for step, number in chosen[-2::-1]:
        rest = [choice for choice in chosen if choice[0] is not step]
        milder = ([*chosen[: chosen.index((step, number))], (step, other), *chosen[chosen.index((step, number)) + 1 :]]
                  for other in range(number))  # fmt: skip
        chosen = next((less for less in (rest, *milder) if _fits(start, less)), chosen)
    words, trial = _made(start, chosen)
    return Advice(tuple(words), trial.forecast())


def _fits(start: Trial, chosen: Sequence[Choice]) -> bool:
    try:
        found = _tried(_made(start, chosen)[1])
    except IndexError:  # a step offers less once another change is gone
        return False
    return found is not None and found.fits


def _made(start: Trial, chosen: Sequence[Choice]) -> tuple[list[str], Trial]:
    """The run with these changes, and their words. Raises `IndexError` where one is not offered."""
    trial, words = start, []
    for step, number in chosen:
        name, trial = list(_offers(step, trial))[number]
        words.append(name)
    return words, trial


def _frees(before: Forecast, after: Forecast) -> bool:
    """Whether what is scarce becomes less: the device's memory, or else the host's."""
    if before.headroom < 0:
        return after.device < 0.99 * before.device
    return after.headroom >= 0 and after.host_node < 0.99 * before.host_node


def _tried(trial: Trial) -> Forecast | None:
    try:
        return trial.forecast()
    except ConfigError:
        return None


def _offers(step: Step, trial: Trial) -> Iterator[Change]:
    """What a step offers, without what the run's other settings do not go with."""
    try:
        yield from step(trial)
    except ValueError:
        return


def _run_with(trial: Trial, section: str, **values: Any) -> Trial:
    """The trial with other settings of the run, and models as they ask for."""
    run = trial.subject.run
    changed = RunConfig.model_validate({**run.model_dump(), section: {**getattr(run, section).model_dump(), **values}})
    old = trial.subject
    subject = with_models(changed, old.run_file, lengths=old.lengths, layout=old.layout, hidden_size=old.hidden_size)
    return replace(trial, subject=subject)


def _checkpointing(trial: Trial) -> Iterator[Change]:
    if not trial.subject.run.model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true", _run_with(trial, "model", gradient_checkpointing=True)


def _scoring(trial: Trial) -> Iterator[Change]:
    run = trial.subject.run
    if run.reference_strategy() != "none" and run.reference.score_tokens > run.batch.tokens_per_micro_batch:
        tokens = run.batch.tokens_per_micro_batch
        yield f"reference.score_tokens: {tokens}", _run_with(trial, "reference", score_tokens=tokens)


def _micro_batches(trial: Trial) -> Iterator[Change]:
    """Smaller ones, down to the longest pair alone."""
    batch = trial.subject.run.batch
    if batch.pairs_per_micro_batch:
        pairs = batch.pairs_per_micro_batch // 2
        while pairs:
            yield f"batch.pairs_per_micro_batch: {pairs}", _run_with(trial, "batch", pairs_per_micro_batch=pairs)
            pairs //= 2
        return
    longest = _longest(trial)
    tokens = batch.tokens_per_micro_batch // 2
    while tokens >= max(256, longest):
        smaller = _run_with(trial, "batch", tokens_per_micro_batch=tokens)
        if trial.subject.run.reference.score_tokens > tokens:
            smaller = _run_with(smaller, "reference", score_tokens=tokens)
            yield f"batch.tokens_per_micro_batch and reference.score_tokens: {tokens}", smaller
        else:
            yield f"batch.tokens_per_micro_batch: {tokens}", smaller
        tokens //= 2


def _mlps_in_tiles(trial: Trial) -> Iterator[Change]:
    model, tokens = trial.subject.run.model, _longest(trial)
    if model.mlp_tile_tokens is None and tokens >= LONG and list(mlps_of(trial.subject.policy.lm)):
        tile = 2048 if tokens < 64 * 2048 else 16_384
        yield f"model.mlp_tile_tokens: {tile}", _run_with(trial, "model", mlp_tile_tokens=tile)


def _shared_rows(trial: Trial) -> Iterator[Change]:
    """Rows split over as few ranks as will do."""
    subject, now = trial.subject, trial.subject.run.distributed.sequence_parallel
    if subject.layout.name != "packed" or _longest(trial) < LONG:
        return
    heads = [
        base_lm(blank.lm).config.get_text_config().num_attention_heads for blank in (subject.policy, subject.scorer)
    ]
    for size in range(now + 1, trial.machine.ranks + 1):
        if not any(number % size for number in (trial.machine.ranks, *heads)):
            changed = _run_with(trial, "distributed", sequence_parallel=size)
            yield f"distributed.sequence_parallel: {size}, by which so many ranks share a row", changed


def _longest(trial: Trial) -> int:
    """Tokens that the longest pair takes in a pass."""
    cost = COSTS[trial.subject.layout.name]
    return max(int(cost(lengths[None])[0]) for lengths in trial.subject.lengths)


def _sharded_reference(trial: Trial) -> Iterator[Change]:
    if trial.subject.reference.own_engine and trial.machine.ranks > 1 and _stage(_own(trial)) != 3:
        yield (
            "a reference at ZeRO stage 3 (reference.deepspeed: ds_configs/reference/zero3.json)",
            replace(trial, reference={"zero_optimization": {"stage": 3}}),
        )


def _reference_on_host(trial: Trial) -> Iterator[Change]:
    if trial.subject.reference.own_engine and "offload_param" not in _own(trial).get("zero_optimization", {}):
        yield (
            "the reference in host memory (reference.deepspeed: ds_configs/reference/zero3_offload.json)",
            replace(trial, reference={"zero_optimization": {"stage": 3, "offload_param": CPU}}),
        )


def _precomputed(trial: Trial) -> Iterator[Change]:
    run = trial.subject.run
    if run.reference_strategy() != "separate" or run.reference.sync_ref_model or run.loss.rows == "lists":
        return
    changed = _run_with(trial, "reference", strategy="precomputed", look_ahead_steps=1)
    yield "reference.strategy: precomputed, so that the reference is gone while the policy trains", changed


def _higher_stage(trial: Trial) -> Iterator[Change]:
    for level in range(_stage(trial.policy) + 1, 4 if trial.machine.ranks > 1 else 0):
        changed = _edited(trial, stage=level)
        yield f"ZeRO stage {level} for the policy (deepspeed: ds_configs/zero{level}.json)", changed


def _activations_on_host(trial: Trial) -> Iterator[Change]:
    model = trial.subject.run.model
    if model.gradient_checkpointing and not model.activation_offloading:
        yield "model.activation_offloading: true", _run_with(trial, "model", activation_offloading=True)


def _optimizer_on_host(trial: Trial) -> Iterator[Change]:
    if "offload_optimizer" not in trial.policy.get("zero_optimization", {}):
        level = max(2, _stage(trial.policy))
        yield (
            f"the policy's optimizer in host memory ({'ds_configs/zero2_offload.json' if level == 2 else 'stage 3'}, "
            "offload_optimizer)",
            _edited(trial, stage=level, offload_optimizer=CPU),
        )


def _parameters_on_host(trial: Trial) -> Iterator[Change]:
    if "offload_param" not in trial.policy.get("zero_optimization", {}):
        yield (
            "the policy's optimizer and weights in host memory (deepspeed: ds_configs/zero3_offload.json)",
            _edited(trial, stage=3, offload_optimizer=CPU, offload_param=CPU),
        )


def _lora(trial: Trial) -> Iterator[Change]:
    run = trial.subject.run
    if run.model.lora is None:
        lora = LoraConfig(r=16, target_modules="all-linear").model_dump()
        yield (
            "model.lora: {r: 16}, which trains an adapter in place of all weights",
            _run_with(trial, "model", lora=lora),
        )


def _base_in_4_bits(trial: Trial) -> Iterator[Change]:
    model = trial.subject.run.model
    if model.quantization is None and model.lora is not None:
        yield "model.quantization: {bits: 4}, a base in 4 bits", _run_with(trial, "model", quantization={"bits": 4})
    elif model.lora is None:
        for words, changed in _lora(trial):
            yield f"{words}; model.quantization: {{bits: 4}}", _run_with(changed, "model", quantization={"bits": 4})


def _more_ranks(trial: Trial) -> Iterator[Change]:
    machine, ranks = trial.machine, trial.machine.ranks * 2
    while ranks <= MOST_RANKS and not machine.gpu.is_cpu:
        per_node = machine.per_node if machine.nodes > 1 else min(ranks, max(8, machine.per_node))
        yield f"{ranks} ranks", replace(trial, machine=replace(machine, ranks=ranks, per_node=per_node))
        ranks *= 2


STEPS: tuple[Step, ...] = (
    _checkpointing,
    _scoring,
    _micro_batches,
    _mlps_in_tiles,
    _sharded_reference,
    _higher_stage,
    _activations_on_host,
    _shared_rows,
    _reference_on_host,
    _optimizer_on_host,
    _parameters_on_host,
    _precomputed,
    _lora,
    _base_in_4_bits,
    _more_ranks,
)


def _own(trial: Trial) -> Config:
    """What the reference's engine is made from: its JSON, or what is derived from the policy's."""
    if trial.reference is not None:
        return trial.reference
    zero = trial.policy.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return {"zero_optimization": {"stage": 0}}
    return {"zero_optimization": {"stage": 3} | {key: zero[key] for key in ("offload_param",) if key in zero}}


def _edited(trial: Trial, **zero: Any) -> Trial:
    """The trial with other keys in the policy's `zero_optimization` block."""
    policy = copy.deepcopy(trial.policy)
    policy["zero_optimization"] = {**policy.get("zero_optimization", {}), **zero}
    return replace(trial, policy=policy)


def _stage(raw: Config) -> int:
    return int(raw.get("zero_optimization", {}).get("stage", 0))
