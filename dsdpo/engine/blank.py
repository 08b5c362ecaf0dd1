"""A model without its weights, on torch's meta device: what can be known of it before gigabytes are read.

transformers builds and "loads" it from the names and shapes in the files' headers, so that its own rules of renaming,
merging and tying decide what is missing.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dsdpo.config.model import ModelConfig
from dsdpo.data.binning import LayoutName
from dsdpo.engine.weight_files import Shapes, first_difference, model_tensors, some
from dsdpo.errors import ConfigError
from dsdpo.objective.attention import NAMES
from dsdpo.objective.logps import ResponseScorer

# Buffers that older files hold and newer models compute.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|position_ids)$")
# Names as DeepSpeed's zero_to_fp32.py takes them from a checkpoint of ours: those of a `ResponseScorer`.
SCORER_PREFIX = "lm."


def check_model_fits(model: ModelConfig, *, layout: LayoutName, key: str) -> Any:
    """The model on the meta device, after every check that needs no weights; no two of them share memory.

    Raises `ConfigError`, which names the setting `key`, where weights are missing, left over, of another shape or
    unreadable, and where the model is not made of a decoder and a linear head that dsdpo can follow.
    """
    folder = Path(model.path).expanduser()
    shapes = model_tensors(folder, key=key, allow_pickle=model.allow_pickle) if folder.is_dir() else None
    lm = blank_lm(model, layout=layout, key=key)
    if shapes is not None:
        _check_weights(lm, shapes, model, key=key)
    try:
        ResponseScorer(copy.deepcopy(lm))
    except ConfigError as error:
        raise ConfigError(f"{key}: {model.path}: {error}") from error
    return lm


def blank_lm(model: ModelConfig, *, layout: LayoutName = "padded", key: str = "model.path") -> Any:
    """The model as its configuration says, without memory or weights."""
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    name = attention_name(model, layout)
    try:
        with torch.device("meta"), quiet_loading():
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=model.trust_remote_code, attn_implementation=name
            )
    except Exception as error:  # whatever a model's own code raises for settings that it cannot be built with
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if name is not None and re.search("attention|attn|flash", str(error), re.IGNORECASE):
            raise ConfigError(
                f"model.attn_implementation: {name} cannot be used for {model.path}: {first_line}; set it to auto"
            ) from error
        what = f"no {first_line} is known" if isinstance(error, KeyError) else first_line
        raise ConfigError(f"{key}: {model.path} cannot be built from its config.json: {what}; correct it") from error


def attention_name(model: ModelConfig, layout: LayoutName) -> str | None:
    """The name under which transformers finds the attention for a model, None for transformers' choice."""
    name = model.attn_implementation
    if layout == "packed":
        return NAMES[name]
    return None if name == "auto" else name


def key_mapping(model: ModelConfig) -> dict[str, str] | None:
    """Renaming for transformers: of weights that carry the names of a checkpoint of ours."""
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        return None
    return _renaming(model_tensors(folder, key="model.path", allow_pickle=model.allow_pickle))


def _renaming(shapes: Shapes) -> dict[str, str] | None:
    ours = bool(shapes) and all(name.startswith(SCORER_PREFIX) for name in shapes)
    return {"^" + re.escape(SCORER_PREFIX): ""} if ours else None


def _check_weights(lm: Any, shapes: Shapes, model: ModelConfig, *, key: str) -> None:
    """Raise `ConfigError` unless tensors of these names and shapes make the model whole."""
    with torch.device("meta"):
        stand_ins = {name: torch.empty(shape) for name, shape in shapes.items()}
    with quiet_loading() as report:
        try:
            _, found = type(lm).from_pretrained(
                None,
                config=copy.deepcopy(lm.config),
                state_dict=stand_ins,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                key_mapping=_renaming(shapes),
            )
        except Exception as error:  # transformers' rules of merging, given what they cannot merge
            lines = [line for text in report for line in text.splitlines() if "CONVERSION" in line]
            names = some([_plain(line).split("|")[0].strip() for line in lines]) or str(error).splitlines()[0]
            raise ConfigError(
                f"{key}: the weights in {model.path} do not make a {type(lm).__name__}: of {names} parts are missing "
                f"or of other shapes; {REMEDY}"
            ) from error
    refuse_unfit(
        found, shapes, f"{key}: the weights in {model.path} do not fit its config.json", what=type(lm).__name__
    )
    tied: dict[str, str] = getattr(lm, "all_tied_weights_keys", {})
    if different := first_difference(Path(model.path).expanduser(), tied):
        raise ConfigError(
            f"{key}: the config.json of {model.path} makes {different[0]} and {different[1]} one tensor "
            "(tie_word_embeddings), but the weights hold two: set tie_word_embeddings to false if both count, or leave "
            "the first out of the weights"
        )


REMEDY = "copy or download the model again, or correct config.json; nothing was trained"


def refuse_unfit(found: dict[str, Any], shapes: Shapes, start: str, *, what: str, remedy: str = REMEDY) -> None:
    """Raise `ConfigError` that begins with `start` if transformers found anything missing, left over or misshapen."""
    parts = []
    if missing := sorted(found["missing_keys"]):
        parts.append(f"missing: {some(missing)}")
    if extra := sorted(name for name in found["unexpected_keys"] if not COMPUTED.search(name)):
        parts.append(f"not of a {what}: {some(extra)}")
    wrong = sorted(found["mismatched_keys"], key=lambda entry: entry[0])
    if wrong:
        parts.append(
            "of another shape: " + some([f"{name} {list(ours)} where {list(due)} is due" for name, ours, due in wrong])
        )
    empty = sorted(name for name, shape in shapes.items() if 0 in shape)
    if empty and not wrong:
        parts.append(f"without elements: {some(empty)}")
    if found.get("error_msgs"):
        parts.append("; ".join(found["error_msgs"])[:300])
    if parts:
        raise ConfigError(f"{start}: {'; '.join(parts)}; {remedy}")


@contextmanager
def quiet_loading() -> Iterator[list[str]]:
    """A block in which transformers neither prints its report of loading nor a bar; yields what it would have said."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    logger, bar = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()
    logger.addFilter(keep)
    transformers_logging.disable_progress_bar()
    try:
        yield said
    finally:
        logger.removeFilter(keep)
        if bar:
            transformers_logging.enable_progress_bar()


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
