"""Adapters on a causal language model: putting them on, switching between them, taking them out whole.

A policy has one trained adapter and, where the reference needs its own, a second, frozen one on the same base weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsdpo.config.lora import ON_THE_HEAD, LoraConfig
from dsdpo.config.model import ModelConfig
from dsdpo.distributed import all_or_none, rank
from dsdpo.engine.adapter_folder import ADAPTER_WEIGHTS
from dsdpo.engine.blank import key_mapping, refuse_unfit
from dsdpo.engine.shards import MergedWeight, finish_writes, release_gathered, whole_state_dict, writable_shard
from dsdpo.engine.types import TrainingEngine
from dsdpo.engine.weight_files import Shapes, safetensors_shapes
from dsdpo.errors import CheckpointError, ConfigError
from dsdpo.objective.types import CausalLM

POLICY, REFERENCE = "default", "reference"  # peft's names of the two adapters


def add_adapter(lm: CausalLM, model: ModelConfig, *, seed: int, trainable: bool = True) -> peft.PeftModel:
    """`lm` with the adapter of `model.lora`: a fresh one drawn from `seed`, or one read from its folder.

    Goes before `deepspeed.initialize`, which partitions adapters with the rest; the base may be partitioned already.
    The adapter takes the model's dtype. peft would hold it in float32 over a 16-bit base, but ZeRO-1 and 2 cast the
    whole model to one dtype, and the stages must not differ. No update is lost by it: the optimizer keeps float32
    masters of whatever it trains, under every stage.
    """
    lora = model.lora
    assert lora is not None
    try:
        if lora.path is not None:
            wrapped = peft.PeftModel.from_pretrained(
                lm, lora.path, is_trainable=trainable, autocast_adapter_dtype=False, torch_device="cpu"
            )
        else:
            with torch.random.fork_rng(devices=[]):
                # The same adapter on every rank and under every stage.
                torch.default_generator.manual_seed(seed)
                wrapped = peft.get_peft_model(lm, fresh_config(lora, lm), autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, TypeError) as error:  # names that match nothing, other shapes, ...
        what = f"path {lora.path}" if lora.path else f"target_modules {lora.target_modules}"
        raise ConfigError(f"model.lora.{what} does not fit {model.path}: {error}") from error
    if isinstance(wrapped.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(f"model.lora: {ON_THE_HEAD}")
    config = wrapped.peft_config[POLICY]
    folder = Path(model.path).expanduser()
    config.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else model.path
    config.revision = model.revision
    return wrapped


def check_adapter_fits(lm: CausalLM, model: ModelConfig) -> None:
    """Raise `ConfigError` unless the adapter of `model.lora`, if any, fits and is whole; spoils `lm`.

    `lm` is the model without memory or weights (see `engine.blank`), so an adapter on it costs nothing.
    """
    if model.lora is None:
        return
    with torch.device("meta"):
        if model.lora.path is None:
            check_names(model, lm)
            add_adapter(lm, model, seed=0)
        else:
            folder = Path(model.lora.path).expanduser()
            stored = safetensors_shapes(folder / ADAPTER_WEIGHTS, key="model.lora.path")
            check_stored_adapter(with_settings_of(lm, model), stored, folder)


def check_names(model: ModelConfig, lm: CausalLM) -> None:
    """Raise `ConfigError` for a name in the settings of a fresh adapter that no part of the model has.

    peft minds only if not one name is there.
    """
    lora = model.lora
    assert lora is not None
    names = [name for name, _ in lm.named_modules()]
    given: list[tuple[str, str, bool]] = []  # setting, name, whether it is a regular expression
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(lora, key)
        given += [(key, each, False) for each in value or ()] if not isinstance(value, str) else []
    given += [(key, each, True) for key in ("rank_pattern", "alpha_pattern") for each in getattr(lora, key)]
    for key, each, pattern in given:
        wanted = re.compile(rf"(.*\.)?({each if pattern else re.escape(each)})")
        if not any(wanted.fullmatch(name) for name in names):
            ends = sorted({name.split(".")[-1] for name, part in lm.named_modules() if isinstance(part, nn.Linear)})
            raise ConfigError(
                f"model.lora.{key}: {each} is no part of {model.path}; its linear layers are {', '.join(ends)}: give "
                "one of them, or leave it out"
            )
    layers = lora.layers_to_transform
    number = getattr(lm.config.get_text_config(), "num_hidden_layers", None)
    for index in [layers] if isinstance(layers, int) else layers or ():
        if number is not None and not 0 <= index < number:
            raise ConfigError(f"model.lora.layers_to_transform: {model.path} has layers 0 to {number - 1}, no {index}")


def blank_adapter(lm: Any, model: ModelConfig, *, second: bool = False) -> peft.PeftModel:
    """`lm`, a model on the meta device, with the adapter of `model.lora` and without its weights.

    With `second` the reference's adapter stands beside it. Raises `ConfigError` where the adapter does not fit.
    """
    assert model.lora is not None
    with torch.device("meta"):
        wrapped = add_adapter(lm, model, seed=0) if model.lora.path is None else with_settings_of(lm, model)
        if second:
            add_reference_adapter(wrapped)
    return wrapped


def check_stored_adapter(wrapped: peft.PeftModel, stored: Shapes, folder: Path) -> None:
    """Raise `ConfigError` unless a file of these tensors fills the adapter on `wrapped`, no more and no less."""
    due, allowed = (
        {
            name: tuple(getattr(tensor, "ds_shape", tensor.shape))
            for name, tensor in get_peft_model_state_dict(
                wrapped, dict(wrapped.named_parameters(remove_duplicate=False)), POLICY, save_embedding_layers=whole
            ).items()
        }
        for whole in (False, True)
    )
    found = {
        "missing_keys": due.keys() - stored.keys(),
        "unexpected_keys": stored.keys() - allowed.keys(),
        "mismatched_keys": [
            (name, stored[name], shape) for name, shape in due.items() if stored.get(name, shape) != shape
        ],
    }
    if not stored:
        raise ConfigError(f"model.lora.path: {folder / ADAPTER_WEIGHTS} holds no weights; give a whole adapter folder")
    refuse_unfit(
        found,
        stored,
        f"model.lora.path: {folder} does not fit its adapter_config.json and this model",
        what="LoRA on it",
        remedy="give the adapter of this model, whole; nothing was trained",
    )


def with_settings_of(lm: CausalLM, model: ModelConfig) -> peft.PeftModel:
    """`lm` with an adapter of the settings, but not the weights, of the folder in `model.lora.path`."""
    assert model.lora is not None
    try:
        config = peft.PeftConfig.from_pretrained(model.lora.path)
        config.inference_mode = False
        return peft.get_peft_model(lm, config, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ConfigError(f"model.lora.path {model.lora.path} does not fit {model.path}: {error}") from error


def fresh_config(lora: LoraConfig, lm: CausalLM) -> peft.LoraConfig:
    """peft's configuration of a fresh adapter.

    With tied embeddings, training one of embedding and head whole trains both as the one matrix that they are: peft
    would by default train a copy of one and leave the other behind.
    """
    config = peft.LoraConfig(task_type="CAUSAL_LM", **lora.peft_fields())
    if getattr(lm.config.get_text_config(), "tie_word_embeddings", False):
        ends = {id(lm.get_input_embeddings()), id(lm.get_output_embeddings())}
        names = {name.split(".")[-1] for name, module in lm.named_modules() if id(module) in ends}
        config.ensure_weight_tying = any(key.split(".")[-1] in names for key in lora.modules_to_save or ())
    return config


def add_reference_adapter(lm: peft.PeftModel) -> None:
    """Give the model a second adapter: a frozen copy of the first, modules_to_save included, without dropout."""
    config = copy.deepcopy(lm.peft_config[POLICY])
    config.lora_dropout, config.inference_mode = 0.0, True
    with torch.random.fork_rng(devices=[]):
        lm.add_adapter(REFERENCE, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for _, source, target in adapter_pairs(lm):
            target.copy_(source).requires_grad_(False)
    lm.set_adapter(POLICY)


def adapter_pairs(lm: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """The name of each policy-adapter parameter, the parameter, and the reference adapter's counterpart."""
    parameters = dict(lm.named_parameters())
    pairs = []
    for name, source in parameters.items():
        if is_in(name, POLICY):
            other = ".".join(REFERENCE if part == POLICY else part for part in name.split("."))
            pairs.append((name, source, parameters[other]))
    return pairs


def merged_parameters(scorer: nn.Module) -> dict[str, Any]:
    """The policy as parameters of a model without adapter, by that model's names; LoRA layers as `MergedWeight`.

    Raises `ConfigError` for adapters that are more than a product added to a linear weight.
    """
    parameters: dict[str, Any] = {}
    for name, parameter in scorer.named_parameters():
        if not is_in(name, POLICY):
            parameters[name.replace("base_model.model.", "").replace(".base_layer.", ".")] = parameter
    for name, layer in scorer.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper) or (
            isinstance(layer, LoraLayer)
            and (not isinstance(layer, Linear) or layer.fan_in_fan_out or layer.use_dora.get(POLICY))
        ):
            raise ConfigError(
                "reference.sync_ref_model cannot merge model.lora's use_dora, modules_to_save or layers that are not "
                f"linear ({name}) into a reference engine: set reference.strategy to adapter, whose own adapter moves"
            )
        if isinstance(layer, Linear) and POLICY in layer.lora_A:
            key = name.replace("base_model.model.", "") + ".weight"
            parameters[key] = MergedWeight(
                layer.base_layer.weight,
                layer.lora_A[POLICY].weight,
                layer.lora_B[POLICY].weight,
                layer.scaling[POLICY],
            )
    return parameters


def is_in(name: str, adapter: str) -> bool:
    """True if the parameter `name` belongs to an adapter (module or parameter names hold the adapter's)."""
    return adapter in name.split(".")


class AdapterSwitch:
    """Chooses which adapter a model's forward passes use.

    Only the layers' switches are set. peft's own `set_adapter` and `disable_adapter` turn `requires_grad` on and off
    with them, of parameters that an engine has taken into its books.
    """

    def __init__(self, lm: nn.Module) -> None:
        self._layers = [
            module for module in lm.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[None]:
        """A block in which the model has this adapter; None: the base model as it was before any."""
        before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in self._layers]
        try:
            for layer in self._layers:
                layer._disable_adapters = adapter is None
                if adapter is not None:
                    layer._active_adapter = [adapter]
            yield
        finally:
            for layer, disabled, active in before:
                layer._disable_adapters, layer._active_adapter = disabled, active


def save_adapter(lm: peft.PeftModel, folder: Path) -> None:
    """Write the policy's adapter as peft does: adapter_config.json, adapter_model.safetensors. Collective.

    Only trained parameters are gathered, in bounded groups, and only rank 0 keeps them.
    """
    state = whole_state_dict(lm, keep=rank() == 0, only=trained_names(lm))
    with all_or_none():
        if state is not None:
            write_adapter(lm, state, folder)


def trained_names(lm: nn.Module) -> set[str]:
    """Names of the parameters that train, tied ones under each of theirs."""
    return {name for name, parameter in lm.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def write_adapter(lm: peft.PeftModel, state: dict[str, Tensor], folder: Path) -> None:
    """Write the policy's adapter from the whole values of its trained parameters; `lm` gives names and settings."""
    # False: dsdpo never resizes embeddings, and to find that out peft would ask the Hub.
    tensors = get_peft_model_state_dict(lm, state, POLICY, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.clone() for key, value in tensors.items()}  # the format takes no tied tensors
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = copy.copy(lm.peft_config[POLICY])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def merged_model(model: ModelConfig, adapter_folder: Path) -> Any:
    """The base model, read anew and whole on this rank's CPU, with an exported adapter merged into it."""
    lm = AutoModelForCausalLM.from_pretrained(
        model.path,
        revision=model.revision,
        dtype=getattr(torch, model.dtype),
        trust_remote_code=model.trust_remote_code,
        use_safetensors=None if model.allow_pickle else True,
        key_mapping=key_mapping(model),
    )
    return peft.PeftModel.from_pretrained(lm, adapter_folder, autocast_adapter_dtype=False).merge_and_unload()


def reference_adapter_state(lm: peft.PeftModel) -> dict[str, Tensor] | None:
    """Copies of the reference's adapter, whole, so that any number of ranks can read it; on rank 0 only. Collective."""
    names = {name for name, _ in lm.named_parameters() if is_in(name, REFERENCE)}
    return whole_state_dict(lm, keep=rank() == 0, only=names)


def load_reference_adapter(engine: TrainingEngine, path: Path) -> None:
    """Put a saved `reference_adapter_state` in place: each rank its own part, without communication.

    Raises `CheckpointError` if the file is not this model's.
    """
    parameters = {name: p for name, p in engine.module.lm.named_parameters() if is_in(name, REFERENCE)}
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(parameters):
            raise CheckpointError(
                f"{path}: not the adapter of this run's reference; resume with the run's own settings"
            )
        release_gathered(engine)
        for name, parameter in parameters.items():
            whole = file.get_tensor(name).view(-1)
            with torch.no_grad(), writable_shard(parameter) as (shard, start):
                shard.copy_(whole[start : start + shard.numel()])
        finish_writes()
