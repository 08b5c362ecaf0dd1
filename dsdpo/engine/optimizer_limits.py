"""Which optimizer a run has, and what does not go with it: found before a model loads.

DeepSpeed hands an optimizer flat partitions, cut without regard to matrices, and asks some of what it offers of its
Adam alone. `engine/optimizers.py` makes the optimizers; docs/optimizers.md has the table of what goes with what.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dsdpo.config.optimizer import NO_ADAFACTOR
from dsdpo.config.run import RunConfig
from dsdpo.engine.deepspeed_keys import Config, lookup

# What dsdpo makes itself if the run names it -> its parameters in the resolved config, beside lr and weight_decay.
PARAMS: dict[str | None, tuple[str, ...]] = {
    "adamw_8bit": ("betas", "eps"),
    "lion": ("betas",),
    "muon": ("momentum", "betas", "eps", "adam_lr"),
    "sgd": ("momentum", "nesterov"),
}
IN_JSON = {"adamw": "AdamW", "adamw_8bit": "adamw_8bit", "lion": "Lion", "muon": "Muon", "sgd": "SGD"}
# Optimizers whose states are one number for each weight of a partition: other ranks, stages or offloads can take them.
MOVABLE = ("adamw", "lion", "sgd", "adagrad", "lamb")
OFFLOAD = "zero_optimization.offload_optimizer.device"
# Keys that DeepSpeed takes with its CPU Adam only.
ADAMS = ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states", "fp16.fp16_master_weights_and_grads")
# Keys under which Muon has not been shown to get whole matrices.
NOT_WITH_MUON = (
    "zero_optimization.round_robin_gradients", "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_hpz_partition_size", "zero_optimization.save_muon_momentum_buffer_in_memory",
)  # fmt: skip
INSTALL = "pip install bitsandbytes, or 'dsdpo[quantized]'"


def makes_optimizer(run: RunConfig) -> bool:
    """True if dsdpo makes the optimizer that the run names, whatever the JSON: all of those but AdamW."""
    return run.optimizer.type in PARAMS


def optimizer_kind(config: Config) -> str:
    """The optimizer of a resolved config, by the name that optimizer.type has or would have."""
    kind = str(lookup(config, "optimizer.type") or "adamw").lower()
    return "adamw" if kind == "adam" else kind


def name_optimizer(config: Config, run: RunConfig, run_source: str | Path) -> Iterator[str]:
    """Write the run's optimizer into a config in place, if dsdpo makes it; a message where the JSON has another."""
    kind = run.optimizer.type
    block = config.get("optimizer")
    if kind is not None and block is not None:
        given = str(block.get("type"))
        if given != "auto" and optimizer_kind(config) != kind:
            yield (
                f"optimizer.type is {given}, but {run_source} has optimizer.type {kind}: make them agree, or delete "
                "the optimizer block of the JSON"
            )
            return
    if kind is None or (kind == "adamw" and block is None):
        return
    block = config.setdefault("optimizer", {})
    block |= {"type": IN_JSON[kind] if kind in PARAMS else block["type"].replace("auto", "AdamW")}
    params = block.setdefault("params", {})
    if kind not in PARAMS:
        return
    own = {"lr", "weight_decay", *PARAMS[kind], *(("torch_adam",) if kind == "muon" else ())}
    for name in sorted(params.keys() - own):
        yield f"optimizer.params.{name} has no effect with optimizer.type {kind} of {run_source}: delete it"
    if kind == "muon":
        params["torch_adam"] = True  # steps what is no matrix
        zero = config.get("zero_optimization", {})
        if needs_whole_gradients(config) and zero.get("reduce_scatter") in (None, "auto"):
            zero["reduce_scatter"] = False
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("zero_allow_untested_optimizer", True)


def needs_whole_gradients(config: Config) -> bool:
    """Whether Muon goes without `reduce_scatter` only.

    At stage 3 DeepSpeed refuses it. At stage 2 with sums in float32 of a model in 16 bits DeepSpeed 0.19.8 drops, and
    says nothing, gradients of AdamW's parameters that lie before a matrix of Muon's in a bucket. The model's dtype may
    not be settled yet, so one in float32 goes without as well.
    """
    zero_stage = lookup(config, "zero_optimization.stage")
    return zero_stage == 3 or (zero_stage == 2 and sums_in_float32(config))


def sums_in_float32(config: Config) -> bool:
    """Whether the JSON has gradients added up in float32, by either of the names that DeepSpeed takes for it."""
    return lookup(config, "data_types.grad_accum_dtype") in ("fp32", "float32")


def optimizer_problems(config: Config, run: RunConfig) -> Iterator[str]:
    """What does not go with the optimizer of a config filled from the run."""
    kind, device = optimizer_kind(config), lookup(config, OFFLOAD) or "none"
    if kind == "adafactor":
        yield NO_ADAFACTOR
    yield from _package_problems(run, device)
    if kind in PARAMS and device == "nvme":
        yield f"{OFFLOAD} is nvme, which keeps states of adamw only, not of optimizer.type {kind}: {_elsewhere(kind)}"
    elif kind == "adamw_8bit" and device != "none":
        yield (
            f"{OFFLOAD} is {device}, where bitsandbytes unpacks all 8-bit states for each step of optimizer.type "
            f"adamw_8bit: {_elsewhere(kind)}"
        )
    for key in ADAMS if kind in PARAMS else ():
        if lookup(config, key):
            yield f"{key} is true, which DeepSpeed has for adamw only, not for optimizer.type {kind}: delete it"
    if kind == "muon":
        yield from _muon_problems(config, run)


def _elsewhere(kind: str) -> str:
    places = "delete offload_optimizer" if kind == "adamw_8bit" else "use cpu, or delete offload_optimizer"
    return f"{places}, or set optimizer.type to adamw"


def _package_problems(run: RunConfig, device: str) -> Iterator[str]:
    kind = run.optimizer.type
    if (kind == "adamw_8bit" or (kind == "lion" and device == "none")) and find_spec("bitsandbytes") is None:
        where = " without offload_optimizer" if kind == "lion" else ""
        yield f"optimizer.type {kind}{where} needs bitsandbytes, which is not installed: {INSTALL}"


def _muon_problems(config: Config, run: RunConfig) -> Iterator[str]:
    if run.optimizer.max_grad_norm:
        yield (
            f"optimizer.type is Muon, of which DeepSpeed clips the updates and not the gradients: set "
            f"optimizer.max_grad_norm of the run to 0, not {run.optimizer.max_grad_norm:g}"
        )
    for key in NOT_WITH_MUON:
        value = lookup(config, key)
        if value is True or (value or 0) > 1:
            yield f"{key} is {str(value).lower()}, with which optimizer.type muon has not been shown to work: delete it"
    if "scheduler" in config and run.optimizer.adam_learning_rate is not None:
        yield (
            "scheduler gives all parameters one learning rate, but the run has optimizer.adam_learning_rate "
            f"{run.optimizer.adam_learning_rate:g}: delete the scheduler block or leave that out"
        )
