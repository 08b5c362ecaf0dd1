"""A run in the making out of another program's settings, and what only one program has."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsdpo.config.load import dotted_keys
from dsdpo.config.yaml_file import read_yaml
from dsdpo.errors import ConfigError

KEYS = dotted_keys()
OFF: tuple[Any, ...] = (None, False, "", "none", "None", "no", [], {})
TEST_SPLIT_SIZE = "dataset_mixture.test_split_size"
LONGEST = 100  # letters of a value that are shown
# Settings that change nothing about what is learned, evaluated or kept here.
IDLE = """
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
ddp_find_unused_parameters debug disable_tqdm do_eval do_train eval_max_new_tokens gradient_checkpointing_kwargs
group_by_length hub_strategy include_num_input_tokens_seen include_tokens_per_second local_rank log_level
log_level_replica logging_first_step logging_strategy model_type overwrite_cache plot_loss preprocessing_batch_size
remove_unused_columns save_safetensors tf32 tokenizer_type torch_empty_cache_steps use_reentrant_gc
"""


@dataclass
class Conversion:
    """A run in the making, and what became of each setting."""

    theirs: dict[str, Any]  # what is not dealt with yet
    gpus: int
    folder: Path  # of their file
    run: dict[str, Any] = field(default_factory=dict)
    taken: list[tuple[str, str]] = field(default_factory=list)  # their setting as they have it, ours as we have it
    left: list[tuple[str, str]] = field(default_factory=list)  # their setting as they have it, what to do
    defaults: dict[str, Any] = field(default_factory=dict)  # of the program, for what its file leaves out

    def take(self, *names: str) -> Any:
        """The value of the first of these names that is there, which is then dealt with; None for none."""
        found = [(name, self.theirs.pop(name)) for name in names if name in self.theirs]
        return next((value for _, value in found if value is not None), None)

    def put(self, key: str, value: Any, *names: str) -> None:
        """Set one of ours, as what `names` of theirs come to."""
        place = self.run
        *sections, last = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
        earlier = [theirs for theirs, ours in self.taken if ours.startswith(f"{key}: ")]
        self.taken = [each for each in self.taken if not each[1].startswith(f"{key}: ")]
        shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("\n...\n")
        self.taken.append((", ".join(dict.fromkeys([*earlier, *names])), f"{key}: {shown.strip()}"))

    def leave(self, name: str, value: Any, why: str) -> None:
        """Note a setting that has no counterpart."""
        text = " ".join(str(value).split())
        self.left.append((f"{name}: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}", why))

    def missed(self) -> list[tuple[str, str]]:
        """Of what has no counterpart, the settings that change something."""
        return [(what, why) for what, why in self.left if what.split(":")[0] not in IDLE.split()]

    def idle(self) -> list[str]:
        """Of what has no counterpart, the names of settings that change nothing here."""
        return sorted({name for what, _ in self.left if (name := what.split(":")[0]) in IDLE.split()})

    def move(self, name: str, key: str, change: Callable[[Any], Any] = lambda value: value) -> None:
        """Set one of ours to one of theirs, if that is there."""
        if (value := self.take(name)) is not None:
            self.put(key, change(value), name)


def source(entry: Any) -> Any:
    """One of their data sources as one of ours."""
    if not isinstance(entry, dict):
        return entry
    path = entry.get("path") or entry.get("id") or entry.get("name")
    result = {"path": path, "name": entry.get("config") or (entry.get("name") if entry.get("path") else None)}
    result |= {key: entry.get(key) for key in ("split", "revision", "weight")}
    files = entry.get("data_files")
    if files:
        result = {"path": files[0] if isinstance(files, list) else files, "split": None}
    result["columns"] = columns_of(entry) or None
    kept = {key: value for key, value in result.items() if value is not None}
    return kept if len(kept) > 1 else kept.get("path")


def columns_of(entry: dict[str, Any]) -> dict[str, str]:
    """Our column names to those of one of axolotl's sources, where they differ."""
    kind = entry.get("type")
    given = entry | kind if isinstance(kind, dict) else entry
    found = {
        ours: given.get(f"field_{ours}") for ours in ("prompt", "system", "chosen", "rejected", "completion", "label")
    }
    messages = given.get("field_messages") or (
        "messages" if kind in ("chat_template", "chat_template.default") else None
    )
    found["prompt"] = found["prompt"] or messages
    return {ours: theirs for ours, theirs in found.items() if isinstance(theirs, str) and theirs != ours}


def parts(found: Conversion) -> None:
    """The rows of each source that are trained on and held out, as slices of its split."""
    sizes = [name for name in ("val_set_size", "val_size", TEST_SPLIT_SIZE) if found.theirs.get(name) not in OFF]
    theirs = sizes[0] if sizes else "val_set_size"
    limit, size = _number(found.take("max_samples")), _number(found.take(theirs))
    given = as_list(found.run.get("data", {}).get("train"))
    train = [each if isinstance(each, dict) else {"path": each} for each in given]
    sliceable = all(each["path"] and "[" not in str(each.get("split")) for each in train)
    if limit and not sliceable:
        found.leave("max_samples", limit, "give {path: ..., split: 'train[:1000]'} in data.train")
    if size and (not sliceable or "eval" in found.run["data"] or (size >= 1 and len(train) > 1)):
        found.leave(theirs, size, "give {path: ..., split: 'train[:95%]'} in data.train, the rest in data.eval")
        size = 0
    if not sliceable or not (limit or size):
        return
    for key, rows in zip(("data.train", "data.eval"), ranges(int(limit), size), strict=True):
        if rows:
            cut = [deepcopy(each) | {"split": f"{each.get('split') or 'train'}[{rows}]"} for each in train]
            names = [name for name, number in (("max_samples", limit), (theirs, size)) if number]
            found.put(key, cut if len(cut) > 1 else cut[0], *names)
    if size:
        why = "the last rows are held out, where others draw them: shuffle the rows first if they are sorted"
        found.leave(theirs, size, why)


def _number(value: Any) -> float:
    """A number of theirs, 0 where there is none. Raises `ConfigError` for other words."""
    try:
        return 0 if value in OFF else value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{value!r}: give max_samples, val_size and val_set_size as numbers") from None


def ranges(limit: int, size: float) -> tuple[str, str]:
    """What stands in the brackets of the slices for training and for evaluation; 0: no limit, none held out."""
    if not size:
        return f":{limit}", ""
    if limit:
        border = limit - (int(size) if size >= 1 else round(size * limit))
        return f":{border}", f"{border}:{limit}"
    border_text = f"-{int(size)}" if size >= 1 else f"{100 * (1 - size):g}%"
    return f":{border_text}", f"{border_text}:"


def templated(kind: str) -> bool:
    """Whether rows of one of axolotl's types are put into a chat template, texts too."""
    return kind.split(".")[0] in ("chat_template", "chatml", "llama3")


def trl(found: Conversion) -> None:
    """What only TRL and alignment-handbook have."""
    mixture = found.take("dataset_mixture", "dataset_mixer")
    splits = found.take("dataset_splits")
    if isinstance(mixture, dict) and isinstance(mixture.get("datasets"), list):
        found.put("data.train", [source(entry) for entry in mixture["datasets"]], "dataset_mixture")
        found.theirs[TEST_SPLIT_SIZE] = mixture.get("test_split_size")
    elif isinstance(mixture, dict):
        mixed(found, mixture, splits if isinstance(splits, list) else [])
    name, pushes = found.take("hub_model_id"), found.take("push_to_hub")
    if pushes and name and "export.push_to_hub" in KEYS:
        found.put("export.push_to_hub", name, "push_to_hub")
    elif pushes:
        found.leave("push_to_hub", pushes, "upload the run's model/ folder with: hf upload NAME OUTPUT_DIR/model")
    for name in ("config", "config_file", "accelerate_config", "num_processes", "do_eval"):
        if (value := found.take(name)) not in OFF:
            found.leave(name, value, "the launcher's, or done after the run: no setting")


def mixed(found: Conversion, mixture: dict[str, Any], splits: list[str]) -> None:
    """alignment-handbook's {name: share of its rows}, read by splits whose names say what they are for."""
    train: list[str | None] = [split for split in splits if "train" in split]
    sources = [
        {"path": name, "split": split, "weight": share} for name, share in mixture.items() for split in train or [None]
    ]
    found.put("data.train", [source(entry) for entry in sources], "dataset_mixer")
    held_out = [{"path": name, "split": split} for name in mixture for split in splits if "test" in split]
    if held_out:
        found.put("data.eval", held_out, "dataset_splits")


def axolotl(found: Conversion) -> None:
    """What only axolotl has."""
    rl = found.take("rl")
    kinds = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
    if rl in kinds:
        found.theirs.setdefault("loss_type", kinds[rl])
    elif rl is not None:
        found.leave("rl", rl, "dsdpo trains on preference data only: dpo, ipo, kto, orpo and simpo")
    if found.take("lora_target_linear"):
        found.theirs["lora_target_modules"] = "all-linear"
    tokens = found.take("special_tokens")
    if isinstance(tokens, dict) and tokens.get("pad_token"):
        found.put("model.pad_token", tokens.pop("pad_token"), "special_tokens.pad_token")
    if tokens:
        found.leave("special_tokens", tokens, "give a model whose tokenizer has them")
    found.take("strict")  # of loading weights, which is always strict here
    nested = found.take("trl")
    if isinstance(nested, dict):
        found.theirs |= {name: value for name, value in nested.items() if name not in found.theirs}
    found.theirs.pop("base_model_config", None)


def llamafactory(found: Conversion) -> None:
    """What only LLaMA-Factory has."""
    stage = found.take("stage")
    if stage == "kto":
        found.theirs.setdefault("pref_loss", "kto")
    elif stage not in (None, "dpo"):
        found.leave("stage", stage, "dsdpo trains on preference data only: dpo and kto")
    if found.theirs.get("lora_target") == "all":
        found.theirs["lora_target"] = "all-linear"
    if isinstance(found.theirs.get("lora_target"), str) and "," in found.theirs["lora_target"]:
        found.theirs["lora_target"] = [part.strip() for part in found.theirs["lora_target"].split(",")]
    folder = found.take("dataset_dir") or "data"
    for place, key in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if (names := found.take(place)) in OFF:
            continue
        names = names if isinstance(names, list) else [part.strip() for part in str(names).split(",")]
        sources = [registered(name, Path(str(folder)), found) for name in names]
        found.put(key, sources if len(sources) > 1 else sources[0], place)
        found.put("data.text", "chat", place)  # its template is put around texts too


def registered(name: str, folder: Path, found: Conversion) -> Any:
    """The source that LLaMA-Factory's dataset_info.json has under a name; the name itself where there is none."""
    table = next((each / "dataset_info.json" for each in (folder, found.folder / folder)
                  if (each / "dataset_info.json").is_file()), None)  # fmt: skip
    entry = read_yaml(table).get(name) if table is not None else None  # JSON is YAML
    if table is None or not isinstance(entry, dict):
        why = f"a name of dataset_info.json, which is not in the folder {folder}: put the file's path here"
        found.leave("dataset", name, why)
        return name
    result: dict[str, Any] = {"path": entry.get("hf_hub_url") or str(table.parent / str(entry.get("file_name", name)))}
    if entry.get("subset"):
        result["name"] = entry["subset"]
    columns = entry.get("columns")
    if isinstance(columns, dict):
        ours = {key: key for key in ("prompt", "chosen", "rejected", "system", "history", "tools")}
        ours |= {
            "response": "completion",
            "kto_tag": "label",
            "messages": "prompt" if entry.get("ranking") else "completion",
        }
        renamed = {ours[key]: value for key, value in columns.items() if key in ours and ours[key] != value}
        if renamed:
            result["columns"] = renamed
    return result if len(result) > 1 else result["path"]


def openrlhf(found: Conversion) -> None:
    """What only OpenRLHF has."""
    if found.take("ipo"):
        found.theirs["loss_type"] = "ipo"
    columns = {ours: found.take(f"{ours}_key") for ours in ("prompt", "chosen", "rejected")}
    renamed = {ours: theirs for ours, theirs in columns.items() if theirs not in (None, ours)}
    path = found.take("dataset")
    if path is not None:
        paths = [part.strip() for part in str(path).split(",")]
        sources: list[Any] = [{"path": each, "columns": renamed} if renamed else each for each in paths]
        found.put("data.train", sources if len(sources) > 1 else sources[0], "dataset", *(f"{k}_key" for k in renamed))
    if isinstance(betas := found.take("adam_betas"), list) and len(betas) == 2:
        for key, value in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
            found.put(f"optimizer.{key}", value, "adam_betas")
    for name in ("apply_chat_template", "module"):  # rows of messages get it anyway; the launcher's
        found.theirs.pop(name, None)
    if found.take("gradient_checkpointing") is not None:
        found.put("model.gradient_checkpointing", True, "gradient_checkpointing")
    rank = found.take("lora_rank")
    if rank:
        found.theirs["lora_r"] = rank
    else:
        for name in ("lora_alpha", "target_modules", "lora_dropout"):
            found.theirs.pop(name, None)
    if (modules := found.take("target_modules")) is not None:
        found.theirs["lora_target_modules"] = modules


OWN: dict[str, Callable[[Conversion], None]] = {
    "trl": trl, "axolotl": axolotl, "llamafactory": llamafactory, "openrlhf": openrlhf,
}  # fmt: skip


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
