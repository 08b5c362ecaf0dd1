"""From a DeepSpeed JSON and the run to the exact config an engine gets: nothing left on "auto", nothing guessed.

A DeepSpeed JSON stays one: what it states is kept, "auto" and what it leaves open is filled from the run, and where
both state a value and they differ, the run is refused. DeepSpeed itself drops "auto" in silence (`stage: "auto"` is
stage 0). Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from dsdpo.config.run import RunConfig
from dsdpo.console import launched
from dsdpo.engine.deepspeed_keys import OPTIMIZERS, Config, find_mistakes, lookup
from dsdpo.engine.optimizer_limits import makes_optimizer, name_optimizer, optimizer_problems
from dsdpo.engine.statements import Statement, optimizer, precision, schedule, schedule_problems, sizes
from dsdpo.engine.zero_limits import (
    NUMERIC_KEYS,
    batch_problems,
    inference_problems,
    left_auto,
    sharing_problems,
    stage_problems,
    swap_problems,
    training_problems,
    type_problems,
)
from dsdpo.errors import ConfigError

# What a reference needs of a stage-3 policy's block; the rest is about gradients, optimizer states or hpZ groups.
REFERENCE_KEYS = (
    "offload_param", "leaf_module", "overlap_comm", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential", "zero_quantized_weights", "memory_efficient_linear", "override_module_apply",
    "log_trace_cache_warnings", "enable_sanity_checks",
)  # fmt: skip


# What only training has a use for: left out where a reference's JSON has it, whatever it says.
TRAINING_KEYS = (
    "gradient_clipping", "gradient_allreduce_op", "prescale_gradients", "gradient_predivide_factor", "checkpoint",
    "activation_checkpointing", "managed_gradient_accumulation", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "train_batch_size", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "flops_profiler", "comms_logger", "tensorboard", "csv_monitor", "wandb", "comet", "compile", "dump_state",
)  # fmt: skip
HPZ = "zero_hpz_partition_size"
# DeepSpeed 0.19's own, for "auto".
DEFAULTS: dict[str, Any] = {
    "stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000, "allgather_bucket_size": 500_000_000, "contiguous_gradients": True,
    "reduce_scatter": True, "allgather_partitions": True, "round_robin_gradients": False,
    "stage3_gather_16bit_weights_on_model_save": False,
}  # fmt: skip


def read_deepspeed_json(path: str | Path) -> Config:
    """The content of a DeepSpeed JSON, null keys left out. Raises `ConfigError` naming the file, and line if known."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a DeepSpeed JSON: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file with JSON in it") from error
    except RecursionError:
        raise ConfigError(f"{path}: blocks stand inside blocks too deep to be a DeepSpeed JSON") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path}: not a DeepSpeed JSON: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{path}: the key {error.args[0]} stands twice in one block") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {json.dumps(content)[:40]}, but a DeepSpeed JSON is a block in {{ }}")
    return content


def resolve_policy_config(
    raw: Config,
    *,
    source: str | Path,
    run: RunConfig,
    world_size: int,
    hidden_size: int,
    total_steps: int | None,
    run_source: str | Path = "the run",
    per_node: int | None = None,
) -> Config:
    """The policy engine's config, whole: `raw` with everything open filled from the run.

    The batch triple becomes bookkeeping (1 per rank, 1 accumulation step): dsdpo cuts micro-batches and scales
    gradients itself. `total_steps` is None while the data is unread; what depends on it is then a placeholder.
    `per_node` is the number of ranks on a node; None: as the launcher says.
    Raises `ConfigError` listing every unknown key, misfit and contradiction, one per line.
    """
    _refuse(source, find_mistakes(raw))
    config = copy.deepcopy(raw)
    problems = [*name_optimizer(config, run, run_source)]
    _fill_typical_auto(config)
    _keep_second_shards_on_a_node(config, world_size, launched().local_size if per_node is None else per_node)
    statements = [*precision(run), *optimizer(config, run), *schedule(config, run, total_steps)]
    problems += _settle(config, [*statements, *sizes(hidden_size)], run_source)
    problems += schedule_problems(config, run, run_source)
    problems += batch_problems(config, run, run_source)
    _keep_books(config, world_size)
    config["managed_gradient_accumulation"] = False
    # Which waits for the device before every micro-batch of a training engine; dsdpo has timers that do not.
    config["timers"] = {"throughput": {"enabled": False}} | config.get("timers", {})
    if str(lookup(config, "optimizer.type")).lower() not in OPTIMIZERS:  # ours, or one of torch's
        config.setdefault("zero_allow_untested_optimizer", True)
    problems += type_problems(config) if not makes_optimizer(run) else ()
    problems += optimizer_problems(config, run)
    problems += [*left_auto(config)] or [*training_problems(config, run), *stage_problems(config, world_size)]
    _refuse(source, problems)
    return config


def resolve_reference_config(
    raw: Config | None,
    *,
    source: str | Path | None,
    run: RunConfig,
    policy_config: Config,
    world_size: int,
    hidden_size: int,
    run_source: str | Path = "the run",
) -> Config:
    """The reference engine's config: `raw` filled from the run, or where it is None, derived from the policy's.

    Derived: no optimizer, no schedule, the policy's precision, stage 3 from 3 with the policy's parameter offload,
    else stage 0. So too where `raw` is the policy's own JSON. What decides the policy's numbers is taken over where
    `raw` leaves it open. Raises `ConfigError` as `resolve_policy_config` does, also for what two engines cannot share.
    """
    if raw is None:
        return _derive_reference(policy_config, world_size)
    _refuse(source, find_mistakes(raw))
    config = {key: copy.deepcopy(value) for key, value in raw.items() if key not in TRAINING_KEYS}
    _fill_typical_auto(config)
    _keep_second_shards_on_a_node(config, world_size, 1)  # a group that DeepSpeed can make once, for the policy
    _take_over_numerics(config, policy_config)
    problems = [*_settle(config, [*precision(run), *sizes(hidden_size)], run_source)]
    problems += inference_problems(config)
    _keep_books(config, world_size)
    problems += [*left_auto(config)] or stage_problems(config, world_size)
    problems += sharing_problems(config, policy_config)
    _refuse(source, problems)
    return config


def serves_both(raw: Config | None, policy_raw: Config) -> bool:
    """True if a reference's JSON is the policy's: then it is read as "derive the reference's from this"."""
    return raw is not None and raw == policy_raw


def own_reference_json(raw: Config | None, policy_raw: Config, source: str | Path | None) -> Config | None:
    """What `resolve_reference_config` is to take as `raw`: None where the reference has no JSON or shares the policy's.

    Raises `ConfigError` where a shared JSON names a folder for swapped parameters, which one engine alone can have.
    """
    if not serves_both(raw, policy_raw):
        return raw
    remedy = "in a JSON of its own, or leave out reference.deepspeed, and the reference swaps into a folder below it"
    _refuse(source, (f"{problem} {remedy}" for problem in swap_problems(policy_raw, policy_raw)))
    return None


def stage(config: Config) -> int:
    """The ZeRO stage of a resolved config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload_device(config: Config, what: Literal["param", "optimizer"]) -> Literal["none", "cpu", "nvme"]:
    """Where a resolved config keeps the parameters or the optimizer states."""
    return config.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device", "none")


def needed_ops(config: Config) -> set[str]:
    """DeepSpeed's names of the C++ operators that an engine with this resolved config loads.

    Without an optimizer block dsdpo makes AdamW itself: DeepSpeedCPUAdam if its states are offloaded. Of those that a
    run names, Lion alone needs an operator, where its states are offloaded.
    """
    on_cpu = offload_device(config, "optimizer") != "none"
    ops = {"async_io"} if "nvme" in (offload_device(config, "param"), offload_device(config, "optimizer")) else set()
    if "optimizer" not in config:
        return ops | ({"cpu_adam"} if on_cpu else set())
    kind = config["optimizer"]["type"].lower()
    if kind in ("adam", "adamw", "muon") and not config["optimizer"]["params"].get("torch_adam"):
        ops.add("cpu_adam" if on_cpu else "fused_adam")
    elif kind == "lion":
        # On the device dsdpo's own is bitsandbytes', which DeepSpeed calls untested.
        ops |= {"cpu_lion"} if on_cpu else set() if config.get("zero_allow_untested_optimizer") else {"fused_lion"}
    elif kind == "adagrad" and on_cpu:
        ops.add("cpu_adagrad")
    elif kind == "lamb":
        ops.add("fused_lamb")
    return ops


def _unique_keys(pairs: list[tuple[str, Any]]) -> Config:
    """A JSON object; a null stands for DeepSpeed's default and is left out."""
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise KeyError(key)
        seen.add(key)
    return {key: value for key, value in pairs if value is not None}


def _refuse(source: str | Path | None, problems: Iterable[str]) -> None:
    lines = [f"{source}: {problem}" for problem in problems]
    if lines:
        raise ConfigError("\n".join(lines))


def _settle(config: Config, statements: list[Statement], run_source: str | Path) -> Iterator[str]:
    """Fill in place what the JSON leaves open; one message for each value that it states differently."""
    for said in statements:
        given = lookup(config, said.key)
        if given == "auto" or (given is None and said.if_absent):
            *blocks, last = said.key.split(".")
            inner = config
            for name in blocks:
                inner = inner.setdefault(name, {})
            inner[last] = said.value
        elif given is not None and said.run_key is not None and given != said.value:
            yield (
                f"{said.key} is {json.dumps(given)}, but {run_source} has {said.run_key} "
                f'{json.dumps(said.value)}: make them agree, or write "auto" in the JSON'
            )


def _keep_books(config: Config, world_size: int) -> None:
    """DeepSpeed wants a batch triple; where dsdpo owns gradient accumulation it only counts samples with it."""
    config |= {"train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


def _fill_typical_auto(config: Config) -> None:
    """DeepSpeed's defaults for "auto" in keys that Hugging Face's examples write so and transformers leaves to it."""
    zero: Config = config.get("zero_optimization", {})
    for key, default in DEFAULTS.items():
        if zero.get(key) == "auto":
            zero[key] = default


def _keep_second_shards_on_a_node(config: Config, world_size: int, per_node: int) -> None:
    """hpZ's group for "auto": the ranks of a node, or one where there is one node or nodes are not alike."""
    zero: Config = config.get("zero_optimization", {})
    if zero.get(HPZ) == "auto":
        zero[HPZ] = per_node if per_node < world_size and world_size % per_node == 0 else 1


def _take_over_numerics(config: Config, policy: Config) -> None:
    """Fill what an engine computes with from the policy, where a reference's JSON says nothing of it."""
    for name in ("torch_autocast", "data_types"):
        theirs = {key: value for key, value in policy.get(name, {}).items() if f"{name}.{key}" in NUMERIC_KEYS}
        if theirs:
            config[name] = copy.deepcopy(theirs) | config.get(name, {})
    quantized = lookup(policy, "zero_optimization.zero_quantized_weights")
    if quantized is not None and lookup(config, "zero_optimization.stage") == 3:
        config["zero_optimization"].setdefault("zero_quantized_weights", quantized)


def _derive_reference(policy: Config, world_size: int) -> Config:
    config: Config = {key: {"enabled": policy[key]["enabled"]} for key in ("bf16", "fp16")}
    config |= {key: copy.deepcopy(policy[key]) for key in ("torch_autocast", "aio") if key in policy}
    kept = {key: value for key, value in policy.get("data_types", {}).items() if key != "grad_accum_dtype"}
    if kept:
        config["data_types"] = kept
    _keep_books(config, world_size)
    zero: Config = {"stage": 3 if stage(policy) == 3 else 0}
    if stage(policy) == 3:
        theirs = policy["zero_optimization"]
        zero |= {key: copy.deepcopy(theirs[key]) for key in REFERENCE_KEYS if key in theirs}
    config["zero_optimization"] = zero
    if offload_device(config, "param") == "nvme":
        # A second engine on the same folder deletes the first one's swap files (DeepSpeed 0.19.8).
        zero["offload_param"]["nvme_path"] = os.path.join(zero["offload_param"]["nvme_path"], "reference")
    return config
