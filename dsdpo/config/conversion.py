"""A run in the making out of another program's settings, and what only one program has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsdpo.config.load import dotted_keys
from dsdpo.config.yaml_file import read_yaml

KEYS = dotted_keys()
OFF: tuple[Any, ...] = (None, False, "", "none", "None", "no", [], {})


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
        self.taken.append((", ".join(names), f"{key}: {value}"))

    def leave(self, name: str, value: Any, why: str) -> None:
        """Note a setting that has no counterpart."""
        self.left.append((f"{name}: {value}", why))

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
    kept = {key: value for key, value in result.items() if value is not None}
    return kept if len(kept) > 1 else kept.get("path")


def trl(found: Conversion) -> None:
    """What only TRL and alignment-handbook have."""
    mixture = found.take("dataset_mixture", "dataset_mixer")
    if isinstance(mixture, dict):
        entries = mixture.get("datasets")
        if not isinstance(entries, list):  # alignment-handbook's {name: share of its rows}
            entries = [{"path": name, "weight": share} for name, share in mixture.items()]
        found.put("data.train", [source(entry) for entry in entries], "dataset_mixture")
    name, pushes = found.take("hub_model_id"), found.take("push_to_hub")
    if pushes and name and "export.push_to_hub" in KEYS:
        found.put("export.push_to_hub", name, "push_to_hub")
    elif pushes:
        found.leave("push_to_hub", pushes, "upload the run's model/ folder with: hf upload NAME OUTPUT_DIR/model")
    for name in ("config", "config_file", "accelerate_config", "num_processes", "do_eval"):
        if (value := found.take(name)) not in OFF:
            found.leave(name, value, "the launcher's, or done after the run: no setting")


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
    names, folder = found.take("dataset"), found.take("dataset_dir") or "data"
    if names is not None:
        parts = names if isinstance(names, list) else [part.strip() for part in str(names).split(",")]
        sources = [registered(name, Path(str(folder)), found) for name in parts]
        found.put("data.train", sources if len(sources) > 1 else sources[0], "dataset")


def registered(name: str, folder: Path, found: Conversion) -> Any:
    """The source that LLaMA-Factory's dataset_info.json has under a name; the name itself where there is none."""
    table = next((each / "dataset_info.json" for each in (folder, found.folder / folder)
                  if (each / "dataset_info.json").is_file()), None)  # fmt: skip
    entry = read_yaml(table).get(name) if table is not None else None  # JSON is YAML
    if table is None or not isinstance(entry, dict):
        found.leave("dataset", name, f"a name of dataset_info.json, which is not in {folder}: put the file's path here")
        return name
    result: dict[str, Any] = {"path": entry.get("hf_hub_url") or str(table.parent / str(entry.get("file_name", name)))}
    if entry.get("subset"):
        result["name"] = entry["subset"]
    columns = entry.get("columns")
    if isinstance(columns, dict):
        ours = ("prompt", "chosen", "rejected", "system", "history", "tools")
        renamed = {key: value for key, value in columns.items() if key in ours and key != value}
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
