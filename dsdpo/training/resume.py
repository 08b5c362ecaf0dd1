"""Which checkpoint a run goes on from, and whether it is a checkpoint of this very run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsdpo.config.load import flat
from dsdpo.config.run import RunConfig
from dsdpo.config.section import Section
from dsdpo.distributed import world_size
from dsdpo.engine.optimizer_limits import optimizer_kind
from dsdpo.engine.quirks.repartition import cut, why_fixed
from dsdpo.engine.zero_config import stage
from dsdpo.errors import CheckpointError
from dsdpo.reference.identity import ReferenceIdentity
from dsdpo.reference.store import read_identity
from dsdpo.run_folder import RunFolder
from dsdpo.training.checkpoint import all_checkpoints, find_damage, read_state

# Settings that decide what is learned. All others (ZeRO config, micro-batches, logging, paths) may change on resume.
MATHEMATICS = (
    "model.path",
    "model.revision",
    "model.dtype",
    "model.lora",
    "model.tokenizer",
    "model.chat_template",
    "data.train",
    "data.max_length",
    "data.shuffle",
    "loss",
    "reference.strategy",
    "reference.adapter",
    "reference.path",
    "reference.revision",
    "reference.sync_ref_model",
    "reference.ref_model_mixup_alpha",
    "reference.ref_model_sync_steps",
    "optimizer",
    "batch.pairs_per_step",
    "train.num_train_epochs",
    "train.max_steps",
    "train.seed",
    "train.overfit_first_step",
)


def find_checkpoint(run: RunConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, whole, or None to start; and a line for each one passed over. Collective.

    Raises `CheckpointError` for an explicit path that is damaged or not in the run's own folder: DeepSpeed's files are
    pickles, so nobody else's are opened.
    """
    folder = RunFolder(run.output_dir).checkpoints
    if run.checkpoint.resume is None:
        return None, []
    if run.checkpoint.resume == "auto":
        skipped: list[str] = []
        for path in reversed(all_checkpoints(folder)):
            wrong = find_damage(path)
            if wrong is None:
                return path, skipped
            skipped.append(f"{path} is damaged ({wrong}): trying the one before it")
        if skipped:
            raise CheckpointError(
                "checkpoint.resume: no checkpoint is whole, and starting over would delete them:\n  "
                + "\n  ".join(skipped)
                + "\nrepair one, or start over with --overwrite_output_dir true"
            )
        return None, []
    path = Path(run.checkpoint.resume)
    if path.resolve().parent != folder.resolve():
        raise CheckpointError(f"checkpoint.resume: {path} is not in {folder}; name one of that run's, or say auto")
    if wrong := find_damage(path):
        raise CheckpointError(f"checkpoint.resume: {path} is damaged: {wrong}; name another, or say auto")
    return path, []


def check_settings(path: Path, run: RunConfig, *, config: dict[str, Any], data: str) -> list[str]:
    """A line for each setting that has changed since the checkpoint; one that it does not know had its default.

    Raises `CheckpointError` for those that change what is learned, unless `checkpoint.allow_changes` names them. The
    number of ranks and the DeepSpeed `config` do not, unless states are kept in a way that binds them to it. `data` is
    the digest of the training pairs.
    """
    state = read_state(path)
    before, now = defaults() | dict(flat(state["settings"])), dict(flat(run.model_dump(mode="json")))
    check_optimizer(path, state, config)
    before.pop("optimizer.type", None)  # the JSON may have named it
    now.pop("optimizer.type")
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    allowed = tuple(run.checkpoint.allow_changes)
    lines: list[str] = []
    refused: list[str] = []
    for key in changed:
        line = f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        decides = key.startswith(MATHEMATICS)
        (refused if decides and not key.startswith(allowed or ("\0",)) else lines).append(line)
    if data != state["data"] and "data.train" not in allowed:
        refused.append(
            "the training pairs are others: the files of data.train, or settings of data that decide tokens, have "
            "changed (data.train)"
        )
    if refused:
        raise CheckpointError(
            f"{path} belongs to a run with other settings:\n  "
            + "\n  ".join(refused)
            + "\nput them back, or name those that you mean to change in checkpoint.allow_changes"
        )
    decays = before["optimizer.weight_decay"], run.optimizer.weight_decay
    if bool(decays[0]) != bool(decays[1]):
        raise CheckpointError(
            f"{path}: optimizer.weight_decay was {decays[0]} and is {decays[1]}, but states are kept by "
            "groups of parameters, which are others without decay: it must be zero in both or in neither"
        )
    if state["world_size"] != world_size():
        lines.append(f"ranks were {state['world_size']} and are {world_size()}")
    if state["stage"] != stage(config):
        lines.append(f"ZeRO stage was {state['stage']} and is {stage(config)}")
    return [line for line in lines if not line.startswith(("checkpoint.", "overwrite_output_dir"))]


def check_optimizer(path: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise `CheckpointError` where an engine of this config cannot take up the states that `state` tells of."""
    optimizer = optimizer_kind(config)
    saved = state.get("optimizer") or optimizer  # old checkpoints do not say it
    if saved != optimizer:
        raise CheckpointError(
            f"{path}: optimizer.type was {saved} and is {optimizer}, which cannot go on from the other's states: put "
            "it back, or start a new run from the exported model"
        )
    reason = why_fixed(config) or state.get("fixed")
    then, now = ({"ranks": state["world_size"], "zero_optimization.stage": state["stage"]} for _ in range(2))
    now |= {"ranks": world_size(), "zero_optimization.stage": stage(config)}
    if "partitions" in state:
        then, now = then | state["partitions"], now | cut(config)
    if reason and then != now:
        changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        words = [f"{key} was {then.get(key)} and is {now.get(key)}" for key in changed]
        raise CheckpointError(
            f"{path} cannot go on where {', '.join(words)}, with {reason}: resume with the ranks and the DeepSpeed "
            "JSON that saved it, or start a new run from the exported model"
        )


def defaults() -> dict[str, Any]:
    """Default values by dotted name, of sections that have some for all their settings."""
    sections = {name: field.default for name, field in RunConfig.model_fields.items()}
    own = {name: section.model_dump(mode="json") for name, section in sections.items() if isinstance(section, Section)}
    return dict(flat(own))


def check_identity(path: Path, identity: ReferenceIdentity, *, allow: bool) -> list[str]:
    """What differs between the checkpoint's reference and this one. Raises `CheckpointError` unless that is allowed."""
    saved = read_identity(path)
    if saved is None:
        raise CheckpointError(f"{path}: identity.json does not say which reference it was trained against")
    differences = identity.differences(saved)
    if differences and not allow:
        raise CheckpointError(
            f"{path} was trained against another reference: {', '.join(differences)}; give back that one, or set "
            "checkpoint.allow_other_reference to true to go on against this one"
        )
    return differences
