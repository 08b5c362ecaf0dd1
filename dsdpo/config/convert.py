"""Settings of TRL, axolotl, LLaMA-Factory and OpenRLHF as a run of ours, and what of them has no counterpart.

Plain renames come from `foreign_names`, which also answers a foreign key in a run file; here stands what needs more
than another name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from dsdpo.config.conversion import KEYS, OFF, OWN, Conversion, as_list, parts, source, templated
from dsdpo.config.convert_schedule import schedule
from dsdpo.config.foreign_names import FOREIGN
from dsdpo.config.loss import LOSSES
from dsdpo.config.run import RunConfig
from dsdpo.config.script import read_script
from dsdpo.config.shipped import page
from dsdpo.config.unknown_keys import about_unknown
from dsdpo.config.yaml_file import read_yaml
from dsdpo.errors import ConfigError

Program = Literal["trl", "axolotl", "llamafactory", "openrlhf"]
PROGRAMS: tuple[Program, ...] = get_args(Program)
# What a program takes where its file says nothing, as far as that differs from ours (TRL 1.16, LLaMA-Factory 0.9,
# OpenRLHF a3be906).
DEFAULTS: dict[str, dict[str, Any]] = {
    "trl": {"learning_rate": 1e-6, "num_train_epochs": 3, "per_device_train_batch_size": 8, "max_length": 1024,
            "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "llamafactory": {"learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 8,
                     "cutoff_len": 2048, "pref_beta": 0.1},
    "openrlhf": {"learning_rate": 1e-5, "train_batch_size": 128, "max_len": 512, "adam_betas": [0.9, 0.95],
                 "lr_scheduler": "cosine_with_min_lr", "min_lr_ratio": 0.1, "lr_warmup_ratio": 0.03, "zero_stage": 2},
}  # fmt: skip
# Settings on which a result depends most.
TELLING = (
    "loss.type",
    "loss.beta",
    "optimizer.learning_rate",
    "batch.pairs_per_step",
    "train.num_train_epochs",
    "data.max_length",
)
# Where a name that several sections have belongs.
SECTION_OF = {
    "seed": "train.seed",
    "path": "model.path",
    "revision": "model.revision",
    "patience": "evaluation.patience",
}
PACKED = ("padding_free", "sample_packing", "eval_sample_packing", "packing", "neat_packing", "packing_samples",
          "pad_to_sequence_len")  # fmt: skip
SCRIPT_SUFFIXES = (".sh", ".bash", ".sbatch", ".slurm", ".txt")


def convert(path: Path, program: Program, *, gpus: int) -> Conversion:
    """The run that a file of another program describes. Raises `ConfigError` for one that cannot be read.

    A YAML file is read as such, a shell script as the command line in it. `gpus`: all processes of the run together, by
    which per-device batch sizes are multiplied.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    theirs = read_script(path) if path.suffix in SCRIPT_SUFFIXES else read_yaml(path)
    if not theirs:
        raise ConfigError(f"{path}: no settings in it")
    found = Conversion(
        {(name if isinstance(value, dict) else name.replace("-", "_")): value for name, value in theirs.items()},
        gpus,
        path.parent,
    )
    if found.theirs.get("finetuning_type") == "lora" and "lora_rank" in found.theirs:
        found.theirs.setdefault("lora_alpha", 2 * found.theirs["lora_rank"])  # LLaMA-Factory's
    given = {*found.theirs, *map(ours_of, found.theirs)}
    found.defaults = {
        name: value for name, value in DEFAULTS.get(program, {}).items() if not {name, ours_of(name) or name} & given
    }
    if "train_batch_size" in found.theirs or "max_steps" in found.theirs:
        found.defaults.pop("num_train_epochs" if "max_steps" in found.theirs else "per_device_train_batch_size", None)
    found.theirs |= found.defaults
    for step in (OWN[program], model, adapter, data, parts, loss, reference, batch, schedule, tracking, engine):
        step(found)
    renames(found)
    return found


def model(found: Conversion) -> None:
    """Which weights, and their precision."""
    for name in ("bf16", "fp16", "pure_bf16", "bfloat16", "float16"):
        value = found.take(name)
        if value not in OFF:
            found.put("model.dtype", "float16" if "p16" in name or name == "float16" else "bfloat16", name)
    dtype = found.take("torch_dtype", "dtype", "param_dtype")
    if dtype not in (*OFF, "auto"):
        words = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
        found.put("model.dtype", words.get(str(dtype), str(dtype)), "dtype")
    flash = found.take("flash_attn", "flash_attention", "use_flash_attention_2")
    known = {
        "fa2": "flash_attention_2",
        "sdpa": "sdpa",
        "disabled": "eager",
        "auto": "auto",
        "fa3": "flash_attention_3",
    }
    if flash is True or str(flash) in known:
        found.put("model.attn_implementation", known.get(str(flash), "flash_attention_2"), "flash_attention")
    for name, kernel in (("sdp_attention", "sdpa"), ("eager_attention", "eager")):
        if found.take(name) is True:
            found.put("model.attn_implementation", kernel, name)
    template = found.take("chat_template", "template")
    if template is not None and (found.folder / str(template)).is_file():
        found.put("model.chat_template", str(template), "chat_template")
    elif template not in (*OFF, "default", "tokenizer_default"):
        found.leave("chat_template", template, "the tokenizer's own is used; model.chat_template takes a Jinja file")
    checkpointing = found.take("gradient_checkpointing")
    if checkpointing is not None:
        found.put("model.gradient_checkpointing", checkpointing not in OFF, "gradient_checkpointing")


def adapter(found: Conversion) -> None:
    """LoRA, where it is asked for."""
    kind = found.take("finetuning_type", "adapter")
    uses = found.take("use_peft")
    given = "lora_r" in found.theirs and "lora_r" not in found.defaults
    wanted = uses is True or kind in ("lora", "qlora") or (kind is None and uses is None and given)
    if kind not in (None, "lora", "qlora", "full"):
        found.leave("adapter", kind, "only LoRA is known beside training all weights")
    quantized(found, qlora=kind == "qlora", adapter=wanted)
    names = [name for name in found.theirs if name.startswith("lora_") or name in ("use_dora", "use_rslora")]
    if not wanted:
        for name in names:
            found.theirs.pop(name)
            found.defaults.pop(name, None)
        return
    found.run.setdefault("model", {}).setdefault("lora", {})
    found.take("lora_rank") if "lora_r" in found.theirs else None
    for name, key in (
        ("lora_r", "r"), ("lora_rank", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout"),
        ("lora_target_modules", "target_modules"), ("lora_target", "target_modules"),
        ("lora_modules_to_save", "modules_to_save"), ("use_rslora", "use_rslora"), ("use_dora", "use_dora"),
    ):  # fmt: skip
        value = found.take(name)
        if value not in OFF:
            found.put(f"model.lora.{key}", value, name)


def quantized(found: Conversion, *, qlora: bool, adapter: bool) -> None:
    """A base in 4 bits below an adapter."""
    bits, kind = found.take("quantization_bit"), found.take("bnb_4bit_quant_type", "quantization_type")
    double = found.take("use_bnb_nested_quant", "double_quantization", "bnb_4bit_use_double_quant")
    four = found.take("load_in_4bit") is True or bits == 4 or qlora
    if found.take("load_in_8bit") is True or bits not in (*OFF, 4):
        found.leave("load_in_8bit", True, "a base is quantized to 4 bits or not at all: model.quantization {bits: 4}")
    elif four and adapter:
        settings = {"bits": 4, "type": kind, "double": double}
        found.put(
            "model.quantization", {key: value for key, value in settings.items() if value is not None}, "load_in_4bit"
        )
    elif four:
        found.leave("load_in_4bit", True, "weights in 4 bits do not train: set model.lora and model.quantization")


def data(found: Conversion) -> None:
    """Where the pairs are."""
    name, config = found.take("dataset_name", "dataset_name_or_path"), found.take("dataset_config")
    splits = {"data.train": found.take("dataset_train_split", "dataset_split"),
              "data.eval": found.take("dataset_test_split", "eval_split")}  # fmt: skip
    evaluates = found.theirs.get("eval_strategy") not in OFF
    if name is not None:
        for key, split in splits.items():
            if key == "data.train" or split is not None or evaluates:
                found.put(key, source({"path": name, "config": config, "split": split}), "dataset_name")
    elif odd := [split for split in splits.values() if split not in (None, "train", "test")]:
        found.leave("dataset_split", odd[0], "give it in data.train and data.eval: {path: ..., split: NAME}")
    for name in PACKED:
        if found.take(name) not in OFF:
            found.taken.append((name, "data.layout: auto (packed where the model allows it)"))
    for names, key in ((("datasets", "train_dataset"), "data.train"), (("test_datasets", "eval_dataset"), "data.eval")):
        entries = found.take(*names)
        if entries not in OFF:
            listed = [source(entry) for entry in as_list(entries)]
            found.put(key, listed if len(listed) > 1 else listed[0], names[0])
            kinds = [entry.get("type") for entry in as_list(entries) if isinstance(entry, dict)]
            for kind in dict.fromkeys(kind for kind in kinds if isinstance(kind, str) and not templated(kind)):
                found.leave(f"{names[0]}.type", kind, "rows are known by their fields; columns names others")
            if any(isinstance(kind, str) and templated(kind) for kind in kinds):
                found.put("data.text", "chat", f"{names[0]}.type")


def loss(found: Conversion) -> None:
    """Which loss, and its beta."""
    kind = found.take("loss_type", "pref_loss", "dpo_loss_type")
    if kind is not None:
        types = [str(each) for each in as_list(kind)]
        aliases = {"kto_pair": None, "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "sigmoid_dpo": "sigmoid"}
        types = [aliases.get(each, each) or each for each in types]
        if all(each in LOSSES for each in types):
            found.put("loss.type", types if len(types) > 1 else types[0], "loss_type")
        else:
            odd = next(each for each in types if each not in LOSSES)
            found.leave("loss_type", odd, f"no loss of this name: see {page('objectives.md')}")
    beta = found.take("beta", "dpo_beta", "pref_beta", "rl_beta", "orpo_beta", "orpo_alpha")
    if beta is not None:
        found.put("loss.beta", beta, "beta")
    weight = found.take("rpo_alpha", "pref_ftx", "nll_loss_coef", "dpo_ftx")
    if weight not in (*OFF, 0, 0.0):
        found.put("loss.rpo_alpha", weight, "rpo_alpha")
    if found.run.get("loss", {}).get("type") != "simpo":
        return
    for name in ("simpo_gamma", "gamma", "cpo_simpo_gamma"):
        if (value := found.take(name)) is not None:
            found.put("loss.simpo_gamma", value, name)
    if (weight := found.take("cpo_alpha")) not in (*OFF, 0, 0.0):
        found.put("loss.type", ["simpo", "sft"], "cpo_alpha")
        found.put("loss.weights", [1.0, weight], "cpo_alpha")


def reference(found: Conversion) -> None:
    """Whose weights the reference has, and where they are."""
    path = found.take("ref_model", "ref_model_name_or_path", "ref_pretrain")
    if path is not None:
        found.put("reference.path", path, "ref_model")
    if found.take("precompute_ref_log_probs", "precompute_ref_logprobs"):
        found.put("reference.strategy", "precomputed", "precompute_ref_log_probs")
    if found.take("ref_offload"):
        found.put("reference.deepspeed", "ds_configs/reference/zero3_offload.json", "ref_offload")
    if found.take("reference_free"):
        found.put("reference.strategy", "none", "reference_free")
    if not found.theirs.get("sync_ref_model"):
        for name in ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"):
            found.theirs.pop(name, None)


def batch(found: Conversion) -> None:
    """Pairs of a step."""
    whole = found.take("train_batch_size", "global_batch_size")
    each = found.take("per_device_train_batch_size", "micro_train_batch_size", "micro_batch_size")
    accumulated = found.take("gradient_accumulation_steps", "accumulated_gradient") or 1
    if whole is not None:
        found.put("batch.pairs_per_step", whole, "train_batch_size")
    elif each is not None:
        number = _whole(each, "per_device_train_batch_size") * _whole(accumulated, "gradient_accumulation_steps")
        names = f"{each} a device x {accumulated} accumulated x {found.gpus} processes"
        found.put("batch.pairs_per_step", number * found.gpus, names)
    for name in ("per_device_eval_batch_size", "eval_batch_size"):
        found.theirs.pop(name, None)


def tracking(found: Conversion) -> None:
    """Weights & Biases."""
    reports = [str(each) for each in as_list(found.take("report_to") or [])]
    project = found.take("wandb_project")
    uses = found.take("use_wandb")
    if "wandb" in reports or "all" in reports or project or uses:
        found.put("tracking.wandb", {"project": project} if project else {}, "report_to")
        name = found.take("run_name", "wandb_name", "wandb_run_name")
        if name is not None:
            found.put("tracking.wandb.name", name, "run_name")
    else:
        for name in ("run_name", "wandb_name", "wandb_run_name", "wandb_entity", "wandb_group", "wandb_org"):
            found.theirs.pop(name, None)
    if "tensorboard" in reports:
        found.put("tracking.tensorboard", True, "report_to")
    for name in sorted(set(reports) - {"wandb", "tensorboard", "all", "none"}):
        found.leave("report_to", name, "metrics.jsonl is always written; see tracking for what else there is")


def engine(found: Conversion) -> None:
    """The DeepSpeed JSON."""
    path, stage = found.take("deepspeed", "deepspeed_config", "ds_config"), found.take("zero_stage")
    offload = found.take("adam_offload", "offload_optimizer")
    if path not in OFF and (Path(str(path)).is_file() or (found.folder / str(path)).is_file()):
        found.put("deepspeed", str(path), "deepspeed")
    elif path not in OFF:
        digit = re.search(r"z(?:ero)?_?([0-3])", Path(str(path)).name)
        own = shipped_json(int(digit[1]) if digit else 3, offload="offload" in str(path))
        found.put("deepspeed", own, "deepspeed")
        found.leave("deepspeed", path, f"is not here, so {own} takes its place: give its path to keep it")
    elif stage is not None:
        found.put("deepspeed", shipped_json(stage, offload=bool(offload)), "zero_stage")
    else:
        found.put("deepspeed", "ds_configs/zero3.json", "no DeepSpeed JSON there")


def shipped_json(stage: int, *, offload: bool) -> str:
    """Our DeepSpeed JSON of a stage; without ZeRO, optimizer states are partitioned still."""
    return f"ds_configs/zero{stage or 1}{'_offload' if offload and stage in (2, 3) else ''}.json"


def renames(found: Conversion) -> None:
    """Everything else: another name for the same thing, or nothing that we have."""
    for name, value in found.theirs.items():
        key = ours_of(name)
        wrong = None if key is None or value in OFF else refusal(key, value)
        if key is not None and wrong is None:
            if value not in OFF or isinstance(value, bool):
                found.put(key, value, name)
        elif value not in OFF:
            found.leave(name, value, wrong or about_unknown(name, KEYS).lstrip("; ") or "there is no such setting")
    if "output_dir" not in found.run:
        found.put("output_dir", "runs/converted", "no output folder there")


def ours_of(name: str) -> str | None:
    """The setting that a foreign name is another word for, value and all."""
    if name in SECTION_OF or name in KEYS:
        return SECTION_OF.get(name, name)
    advice = FOREIGN.get(name) or ""
    renamed = re.fullmatch(r"use ([a-z0-9_.]+)", advice.split(" | ")[0])
    if renamed and renamed[1] in KEYS:
        return renamed[1]
    own = [key for key in KEYS if key.split(".")[-1] == name]
    return own[0] if len(own) == 1 and not advice else None


def refusal(key: str, value: Any) -> str | None:
    """Why a setting of ours does not take a value, None where it does."""
    *sections, last = key.split(".")
    place = run = {"model": {"path": "-"}, "data": {"train": "-"}, "deepspeed": "-", "output_dir": "-"}
    for section in sections:
        place = place.setdefault(section, {})  # type: ignore[assignment]
    place[last] = value
    try:
        RunConfig.model_validate(run)
    except ValidationError as error:
        for detail in error.errors():
            if ".".join(map(str, detail["loc"])).startswith(key):
                reason = detail["msg"].replace("Input should be", "takes")
                return f"{key} {reason}"
    return None


def silent(run: dict[str, Any]) -> list[str]:
    """The settings on which a result depends most that a converted run leaves to our defaults."""
    return [key for key in TELLING if key.split(".")[1] not in run.get(key.split(".")[0], {})
            and not (key == "train.num_train_epochs" and "max_steps" in run.get("train", {}))]  # fmt: skip


def _whole(value: Any, name: str) -> int:
    """A number of theirs. Raises `ConfigError` for a text such as auto."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}: give a whole number, or set batch.pairs_per_step after converting")
    return value
