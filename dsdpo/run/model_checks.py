"""Models looked at before any weights load: is the folder a model, one that dsdpo can train, and whole?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dsdpo.config.model import ModelConfig
from dsdpo.config.run import RunConfig
from dsdpo.data.binning import LayoutName, longest_sequences
from dsdpo.data.steps import BatchSource
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.data.types import Tokenizer
from dsdpo.engine.blank import check_model_fits
from dsdpo.engine.compiled_layers import layers_of
from dsdpo.engine.kernels import refuse_liger_for
from dsdpo.engine.lora import check_adapter_fits
from dsdpo.engine.optimizers import refuse_matrices
from dsdpo.engine.quantization import check_installed
from dsdpo.engine.rope import longest_allowed
from dsdpo.engine.weight_files import AGAIN
from dsdpo.errors import ConfigError
from dsdpo.objective.sequence_parallel import refuse_heads
from dsdpo.objective.tiles import mlps_of

CAUSAL = "dsdpo trains causal language models"


QUANTIZED = ("quantization_config", "compression_config", "quantization")  # blocks of config.json


def check_models(run: RunConfig, reference: ModelConfig, *, weights: bool = True) -> dict[str, PretrainedConfig]:
    """Hugging Face's configurations of the run's models, by the settings that name them. Raises `ConfigError`.

    Without `weights` folders that have no more than their config.json will do.
    """
    check_installed(run.model, key="model.quantization")
    check_installed(reference, key="reference.quantization")
    models = {"model.path": check_model(run.model, key="model.path", weights=weights)}
    if run.reference.path or run.reference.revision:
        models["reference.path"] = check_model(reference, key="reference.path", weights=weights)
    return models


def check_model(model: ModelConfig, *, key: str, weights: bool = True) -> PretrainedConfig:
    """The model's configuration. Raises `ConfigError` if there is no such model, or none that dsdpo trains.

    Without `weights` a folder that has no more than its config.json will do.
    """
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if model.revision:
            raise ConfigError(
                f"{key.replace('path', 'revision')} {model.revision}: {model.path} is a folder, without revisions: "
                "leave it out, or give a Hub id"
            )
        _check_folder(folder, model, key=key, weights=weights)
    elif folder.is_file() or model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:  # no Hub id
        raise ConfigError(f"{key}: no folder {folder}; give a Hugging Face model folder or Hub id")
    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # whatever the Hub client or a parser raises
        said = " ".join(str(error).split())[:300] or type(error).__name__  # a validator's reason is not its first line
        what = "" if folder.is_dir() else " is no folder here and"
        remedy = "correct its config.json, or copy or download it again" if folder.is_dir() else "correct the path"
        raise ConfigError(f"{key}: {model.path!r}{what} cannot be loaded: {said.rstrip('.')}; {remedy}") from error
    _check_kind(config, model, key=key)
    return config


def _check_folder(folder: Path, model: ModelConfig, *, key: str, weights: bool) -> None:
    """Raise `ConfigError` unless the folder looks like a model, with weights if asked, and say what to give instead."""
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{key}: {folder} holds an adapter; "
            + (
                "give it as model.lora.path, and the model that it was trained on as model.path"
                if key == "model.path"
                else "give a whole model, such as the adapter merged into its base (export.merge_adapter)"
            )
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{key}: {folder} has no config.json; " + (_instead(folder) or "give a Hugging Face model folder or Hub id")
        )
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {folder / 'config.json'} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: {folder / 'config.json'} holds no settings; {AGAIN}")
    for name in QUANTIZED:
        _check_unquantized(content.get(name), name, model, key=key)
    pickled = any(folder.glob("pytorch_model*.bin"))
    if not weights:
        return
    if not any(folder.glob("*.safetensors")) and not (pickled and model.allow_pickle):
        if not pickled:
            raise ConfigError(f"{key}: {folder} has no weights (*.safetensors); give the folder of a whole model")
        raise ConfigError(
            f"{key}: {folder} has its weights only as pytorch_model.bin, a pickle, which can run code when it is "
            "read; save the model again as safetensors (save_pretrained of transformers does), or set "
            "model.allow_pickle to true if you trust where it came from"
        )


def _check_unquantized(stored: Any, name: str, model: ModelConfig, *, key: str) -> None:
    """Raise `ConfigError` if a block of config.json says that weights are stored quantized."""
    if stored is None:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    raise ConfigError(
        f"{key}: the weights of {model.path} are stored quantized ({name}: {method or 'unnamed'}), which dsdpo does "
        "not train; give the model that they were made from, with weights in 16 or 32 bits (model.quantization makes 4 "
        "bits of them, for LoRA)"
    )


def _instead(folder: Path) -> str | None:
    """What to give in place of a folder that a run of dsdpo wrote, if it is one."""
    if (folder / "model" / "config.json").is_file():
        return f"it is a run's folder: give the model in it, {folder / 'model'}"
    if (folder / "model" / "adapter_config.json").is_file():
        return f"it is a run's folder: give the adapter in it, {folder / 'model'}, as model.lora.path"
    if (folder / "state.json").is_file() or folder.name.startswith("step-"):
        run = folder.parent.parent
        return (
            f"it is a checkpoint: go on from it with --checkpoint.resume {folder}, or give the model that its run "
            f"exported, {run / 'model'}"
        )
    if (folder / "checkpoints").is_dir() or folder.name == "checkpoints":
        return "it is a run's folder without an exported model: finish the run with --resume auto"
    return None


def _check_kind(config: PretrainedConfig, model: ModelConfig, *, key: str) -> None:
    """Raise `ConfigError` unless this is a causal language model with weights that can be trained as they are."""
    kind = config.model_type
    text = config.get_text_config()
    for part in (config, text):
        for name in QUANTIZED:
            _check_unquantized(getattr(part, name, None), name, model, key=key)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{key}: {model.path} is an encoder-decoder ({kind}); {CAUSAL}")
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if known is None and not (remote and model.trust_remote_code):
        raise ConfigError(f"{key}: {model.path} ({kind}) is no causal language model; {CAUSAL}")
    if vars(config).get("is_decoder", True) is False:
        raise ConfigError(
            f"{key}: {model.path} ({kind}) sees the tokens that it is to predict (is_decoder is false); {CAUSAL}"
        )
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(text, name, None), int):
            raise ConfigError(f"{key}: the config.json of {model.path} ({kind}) has no {name}; {CAUSAL}")
    positions = getattr(text, "max_position_embeddings", None)
    for name, number in (("hidden_size", text.hidden_size), ("max_position_embeddings", positions)):
        if isinstance(number, int) and number < 1:
            raise ConfigError(f"{key}: the config.json of {model.path} ({kind}) has {name} {number}; correct it")


def check_rank(model: ModelConfig, hidden_size: int) -> None:
    """Raise `ConfigError` for an adapter that holds more than the matrices it adds to."""
    if model.lora is None or model.lora.path is not None:
        return
    ranks = {"r": model.lora.r} | {f"rank_pattern.{name}": r for name, r in model.lora.rank_pattern.items()}
    for name, r in ranks.items():
        if r > hidden_size:
            raise ConfigError(
                f"model.lora.{name}: {r} is more than the hidden size of {model.path}, {hidden_size}; set it to a rank "
                "such as 16"
            )


def check_heads(models: dict[str, PretrainedConfig], size: int) -> None:
    """Raise `ConfigError` unless `size` ranks can share the attention heads of each model; `models` by setting."""
    for key, config in models.items():
        heads = getattr(config.get_text_config(), "num_attention_heads", None)
        if isinstance(heads, int):
            refuse_heads(heads, size, f"{config.model_type} ({key})")


def check_whole_models(
    run: RunConfig, reference: ModelConfig, *, layout: LayoutName, policy_config: dict[str, Any]
) -> None:
    """Build the run's models without their weights and hold the weights' files against them.

    Raises `ConfigError` where tensors are missing, left over or of another shape, files are damaged, a model is not a
    decoder with a linear head, an adapter does not fit, or the policy's optimizer cannot take its shapes.
    """
    lm = check_model_fits(run.model, layout=layout, key="model.path")
    if (reference.path, reference.revision) != (run.model.path, run.model.revision):
        key = "reference.path" if run.reference.path else "reference.revision"
        other = check_model_fits(reference, layout=layout, key=key)
        _check_layers(other, reference)
    check_adapter_fits(lm, run.model)
    refuse_matrices(lm, policy_config, source=run.deepspeed)
    if run.model.mlp_tile_tokens is not None:
        mlps_of(lm)
    _check_layers(lm, run.model)


def _check_layers(lm: Any, model: ModelConfig) -> None:
    """Raise `ConfigError` where the model's layers are not of a make that the settings can have computed otherwise."""
    if model.torch_compile:
        layers_of(lm)
    if model.use_liger_kernel:
        refuse_liger_for(lm.config.model_type)


def check_tokenizers(
    run: RunConfig, reference: ModelConfig, tokenizer: Tokenizer, models: dict[str, PretrainedConfig]
) -> None:
    """Raise `ConfigError` if the reference's tokens mean something else than the policy's.

    `models`: settings to Hugging Face configurations. A reference without a tokenizer must have the policy's number
    of embeddings.
    """
    if run.reference.path is None or run.reference.allow_other_tokenizer:
        return
    cure = "give a reference with the policy's tokenizer, or set reference.allow_other_tokenizer to true"
    ours, theirs = (models[key].get_text_config().vocab_size for key in ("model.path", "reference.path"))
    try:
        other = load_tokenizer(reference.model_copy(update=dict.fromkeys(("tokenizer", "chat_template", "pad_token"))))
    except ConfigError:
        other = None
    if other is None and ours != theirs:
        raise ConfigError(
            f"reference.path: {reference.path} has {theirs} embeddings, {run.model.path} {ours}, and no tokenizer says "
            f"which token is which; {cure}"
        )
    if other is not None and (difference := _first_difference(tokenizer.get_vocab(), other.get_vocab())):
        raise ConfigError(
            f"reference.path: the tokenizer of {reference.path} is not the policy's: {difference}; {cure}"
        )
    if theirs < min(ours, len(tokenizer)):
        raise ConfigError(
            f"reference.path: {reference.path} has {theirs} embeddings, but the tokenizer {len(tokenizer)} tokens; "
            + cure
        )


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    """In words, the first token by id that two vocabularies do not share."""
    if ours == theirs:
        return None
    odd = [*(ours.items() - theirs.items()), *(theirs.items() - ours.items())]
    token = min(odd, key=lambda entry: entry[1])[0]
    known = [
        f"{name} {ids[token]}" if token in ids else f"{name} none" for name, ids in (("here", ours), ("there", theirs))
    ]
    return f"{len(ours)} and {len(theirs)} tokens; {token!r} has the id {' and '.join(known)}"


def check_pairs_fit(
    run: RunConfig, tokenizer: Tokenizer, models: dict[str, PretrainedConfig], sources: Sequence[BatchSource | None]
) -> None:
    """Raise `ConfigError` if a token of the pairs is beyond a model's embeddings, or a pair longer than it takes."""
    for key, config in models.items():
        text = config.get_text_config()
        path = run.model.path if key == "model.path" else run.reference.path or run.model.path
        for source in sources:
            if source is None:
                continue
            # Only then can any be: a pass over all tokens takes a while where there are many.
            largest = int(source.pairs.tokens.max()) if len(tokenizer) > text.vocab_size else 0
            if largest >= text.vocab_size:
                raise ConfigError(
                    f"{key}: {path} has {text.vocab_size} embeddings, but the pairs hold the token "
                    f"{tokenizer.convert_ids_to_tokens(largest)!r}, id {largest}; use the tokenizer that belongs to "
                    "the model (model.tokenizer)"
                )
            longest, limit = int(longest_sequences(source.pairs.lengths).max()), longest_allowed(text)
            if limit and longest > limit:
                raise ConfigError(
                    f"data.max_length: {run.data.max_length}, but {path} ({key}) takes {limit} tokens and the longest "
                    f"pair has {longest}; set data.max_length to {limit} or less"
                )
