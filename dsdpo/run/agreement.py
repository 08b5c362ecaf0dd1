"""What ranks must have in common, compared in one exchange before anything is built.

A node with another run file, model, package or state of the code trains on to the end with exit code 0 and another
loss, or waits for ever in a collective that the others never reach. Rank 0 is no judge: a difference is named with the
hosts on each side of it.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

import dsdpo
from dsdpo.atomic import digest_of
from dsdpo.config.run import ModelConfig, RunConfig
from dsdpo.console import say
from dsdpo.data.tokenize import template_digest, tokenizer_digest
from dsdpo.data.tokenizer import pad_id
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import barrier, by_host, gather_objects, learn_hosts, world_size
from dsdpo.engine.build import device
from dsdpo.engine.zero_config import read_deepspeed_json
from dsdpo.errors import ConfigError

DECISIVE = ("torch", "deepspeed", "transformers", "peft")  # packages whose versions decide numbers
OTHERS = ("numpy", "datasets", "tokenizers", "safetensors")
# Settings that may differ: what they name is compared by its content, or rank 0's alone counts, or none is learned by.
FREE = re.compile(
    r"data\.(train|eval)\[\d+\]\.path|data\.(cache_dir|dataset_num_proc)|(reference\.)?deepspeed|reference\.(path|store)"
    r"|model\.(path|tokenizer|chat_template|lora\.path)|tracking\.(wandb.*|peak_tflops|hints|pairs)"
    r"|distributed\.(timeout_minutes|lost_after)|checkpoint\.(save_pause|deadline|time_limit)|evaluation\.samples\.prompts"
)
SHOWN = 12  # differences that one message names
WIDTH = 70  # of a value in it
SKEW_S = 5.0  # between two clocks, from which on it is said

Facts = dict[str, Any]  # by the name that a message gives it


def agree(run: RunConfig, tokenizer: Tokenizer, models: Mapping[str, PretrainedConfig]) -> None:
    """Compare what all ranks have before them; say in a line what differs without harm. Collective.

    `models`: settings to Hugging Face configurations. Raises `ConfigError` on all ranks for what would give other
    numbers, or leave ranks waiting for each other.
    """
    learn_hosts()
    if world_size() == 1:
        return
    must, may = decisive_facts(run, tokenizer, models), other_facts(run)
    barrier()
    every = gather_objects((must, may, time.clock_gettime(time.CLOCK_REALTIME)))
    wrong = list(differences([facts for facts, _, _ in every]))
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise ConfigError(
            "ranks were started with different things, and would not train one model:\n  "
            + "\n  ".join([*wrong[:SHOWN], *more])
            + "\ngive every node the same run file, DeepSpeed JSONs, models, packages and code"
        )
    harmless = [*differences([facts for _, facts, _ in every]), *skew([clock for _, _, clock in every])]
    if harmless:
        say("nodes differ, without harm to the numbers: " + "; ".join(harmless))


def decisive_facts(run: RunConfig, tokenizer: Tokenizer, models: Mapping[str, PretrainedConfig]) -> Facts:
    """What must be the same on all ranks."""
    facts: Facts = {
        "command": " ".join(word for word in sys.argv[1:] if word in ("train", "precompute", "--dry-run")),
        "dsdpo's code": f"{dsdpo.__version__}, digest {code_digest()}",
        **{name: installed(name) for name in DECISIVE},
        "device": device().type,
        "NCCL": nccl_version(),
    }
    facts |= {key: value for key, value in flat(run.model_dump(mode="json")) if not FREE.fullmatch(key)}
    for key, path in (("deepspeed", run.deepspeed), ("reference.deepspeed", run.reference.deepspeed)):
        if path is not None:
            facts |= {f"{key}: {name}": value for name, value in flat(read_deepspeed_json(path))}
    for key, config in models.items():
        facts |= {
            f"config.json of {key}: {name}": value for name, value in flat(config.to_dict()) if name != "_name_or_path"
        }
    if run.model.lora is not None and run.model.lora.path is not None:
        adapter = Path(run.model.lora.path) / "adapter_config.json"
        facts |= {
            f"adapter_config.json of model.lora.path: {name}": value
            for name, value in flat(json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {})
        }
    return facts | {
        "tokenizer (digest)": tokenizer_digest(tokenizer)[:12],
        "chat template (digest)": template_digest(tokenizer)[:12],
        "tokens that end a response": tokenizer.end_tokens,
        "padding token": pad_id(tokenizer),
    }


def other_facts(run: RunConfig) -> Facts:
    """What may differ, and is said if it does."""
    free = {key: value for key, value in flat(run.model_dump(mode="json")) if FREE.fullmatch(key)}
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return {
        **free,
        "python": platform.python_version(),
        **{name: installed(name) for name in OTHERS},
        "driver": driver_version(),
        "devices": accelerators,
        "device name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "sizes of weight files (rank 0's weights are used)": weight_sizes(run.model),
    }


def differences(facts: Sequence[Facts]) -> Iterator[str]:
    """A line for each fact that is not the same everywhere: each value, and the hosts and ranks that have it."""
    for name in {name: None for one in facts for name in one}:  # in order, each once
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            ranks.setdefault(shown(one[name]) if name in one else "nothing", []).append(rank)
        if len(ranks) > 1:
            yield f"{name}: " + ", ".join(f"{value} on {by_host(theirs)}" for value, theirs in ranks.items())


def shown(value: Any) -> str:
    """A value as a message shows it; long ones that differ stay different."""
    text = json.dumps(value, sort_keys=True, default=str).strip('"')
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 20]}... ({digest_of(text)[:8]})"


def skew(clocks: Sequence[float]) -> Iterator[str]:
    """What is to be said of clocks, in seconds, that were read at about the same time."""
    late, early = max(clocks), min(clocks)
    if late - early > SKEW_S:
        ahead, behind = (by_host([clocks.index(clock)]) for clock in (late, early))
        yield f"clocks: {ahead} is {late - early:.0f} s ahead of {behind}"


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested sections and lists of sections hold, by dotted name."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{prefix}[{index}]")
    else:
        yield prefix, value


@cache
def code_digest() -> str:
    """A digest of the package's own files."""
    root = Path(dsdpo.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json"))
    return digest_of([[str(path.relative_to(root)), path.read_text(encoding="utf-8")] for path in files])[:12]


@cache
def installed(package: str) -> str:
    """A package's version as it was imported or would be."""
    if package == "torch":
        return torch.__version__  # with its CUDA build
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def nccl_version() -> str | None:
    """Of the library in use, None without CUDA."""
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None


def driver_version() -> str | None:
    """Of NVIDIA's kernel module, None without it."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text()) if path.is_file() else None
    return found[0] if found else None


def weight_sizes(model: ModelConfig) -> str:
    """A digest of the names and sizes of a local model's weight files; empty for a Hub id."""
    files = sorted(Path(model.path).glob("*.safetensors"))
    return digest_of([[path.name, path.stat().st_size] for path in files])[:12] if files else ""
