"""What a user may not expect of a DeepSpeed JSON that is right as it stands: keys without effect, lost updates."""

from __future__ import annotations

from collections.abc import Iterator

from dsdpo.engine.deepspeed_keys import Config, lookup

# Dotted key -> why it does nothing in a run of dsdpo.
WITHOUT_EFFECT = {
    "activation_checkpointing": "use model.gradient_checkpointing and model.activation_offloading of the run",
    "comms_logger": "dsdpo has comm/gathers and comm/gathered_gib in metrics.jsonl",
    "compile": "engines are not compiled",
    "dataloader_drop_last": "dsdpo makes the batches, and drops no pair",
    "vocabulary_size": "DeepSpeed only looks at how it divides",
    "checkpoint.parallel_write": "it is about pipeline parallelism",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "dsdpo exports the model itself",
    "zero_optimization.ignore_unused_parameters": "every parameter of the policy is used",
}
MONITORS = ("tensorboard", "csv_monitor", "comet")
STAGE_3 = "zero_optimization.stage3_"


def json_remarks(config: Config, source: str, *, learning_rate: float) -> Iterator[str]:
    """Lines on a policy's JSON, each naming the file and key."""
    for key, reason in WITHOUT_EFFECT.items():
        value = lookup(config, key)
        if value not in (None, False, {}) and not (isinstance(value, dict) and value.get("enabled") is False):
            yield f"{source}: {key} has no effect under dsdpo: {reason}"
    for key in MONITORS:
        if lookup(config, f"{key}.enabled"):
            yield f"{source}: {key} gets DeepSpeed's own few figures (learning rate); metrics.jsonl and W&B have all"
    yield from _precision_remarks(config, source, learning_rate)


def _precision_remarks(config: Config, source: str, learning_rate: float) -> Iterator[str]:
    """What 16-bit master weights do at this learning rate.

    An Adam step moves a weight by about the learning rate. Rounded to nearest, bfloat16 (8 bits of significand) keeps a
    change of a weight w only if it is more than about |w| / 512 to |w| / 256, float16 (11 bits) |w| / 4096.
    """
    for key, bits in (("bf16.bf16_master_weights_and_grads", 8), ("fp16.fp16_master_weights_and_grads", 11)):
        if lookup(config, key):
            largest = learning_rate * 2 ** (bits + 1)
            yield (
                f"{source}: WARNING: with {key} there are no float32 weights to add small steps up in. An Adam step of "
                f"{learning_rate:g} (optimizer.learning_rate) changes only weights smaller than about {largest:.1g}, "
                "and is lost in all others: delete it unless memory leaves no choice, or raise the learning rate"
            )
