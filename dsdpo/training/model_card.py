"""The model card of what a run has trained: README.md with the fields that the Hub reads, and how it came about."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import dsdpo
from dsdpo.config.load import dump_yaml
from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.reference.identity import bias_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
LICENCE = "# license: yours to name; that of the base model and of the data may bind it"
USE = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_HUB_ID", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_HUB_ID")""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "FOLDER_OR_HUB_ID")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_HUB_ID")""",
}


def model_card(
    run: RunConfig,
    metrics: Mapping[str, float],
    *,
    library: str = "transformers",
    identity: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> str:
    """What was trained from what, how, and what came out, without any path of this machine.

    `library` is what loads it, `identity` that of the reference, `step` the one that the weights are of.
    """
    base = shown_path(run.model.path)
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["dpo", "dsdpo"]}
    if hub_id(run.model.path):
        fields |= {"base_model": base, "base_model_relation": "adapter" if library == "peft" else "finetune"}
    if sets := list(dict.fromkeys(source.path for source in run.data.train if hub_id(source.path))):
        fields["datasets"] = sets
    sources = ", ".join(dict.fromkeys(f"`{shown_path(source.path)}`" for source in run.data.train))
    lora = run.model.lora
    with_adapter = "" if lora is None else " with a LoRA adapter"
    if lora is not None and lora.path is not None:
        with_adapter = f" with the adapter `{shown_path(lora.path)}`"
    at = "" if step is None else f" These are the weights after step {step:,}."
    parts = [
        f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n{LICENCE}\n---",
        f"# {Path(run.output_dir).name}",
        f"Trained from `{base}`{with_adapter} on {sources} by preference optimization, with dsdpo "
        f"{dsdpo.__version__}.{at}",
        f"- loss: {run.loss.describe()}\n- reference: {reference_text(run)}{identity_text(identity)}",
        f"## Use\n\n```python\n{USE[library].format(base=base)}\n```",
    ]
    if metrics:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
        parts.append(f"## Last evaluation\n\n| metric | value |\n|---|---|\n{rows}")
    parts.append(f"## Settings\n\n```yaml\n{dump_yaml(without_folders(run)).strip()}\n```")
    return "\n\n".join(parts) + "\n"


def hub_id(path: str) -> bool:
    """Whether a model or data set is one of the Hub's, not a folder or file here."""
    return not Path(path).expanduser().exists() and HUB_ID.fullmatch(path) is not None


def shown_path(path: str) -> str:
    """A path as it may leave this machine: a Hub id as it is, of a folder or file its name."""
    return path if hub_id(path) else Path(path).expanduser().resolve().name


def without_folders(run: RunConfig) -> RunConfig:
    """The run with the last part of each path that is a place on this machine."""
    content = _named(run.model_dump(mode="json"))
    return RunConfig.model_validate(content)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _named(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner) for inner in value]
    if isinstance(value, str) and len(value) < 4096 and (os.path.isabs(value) or value.startswith((".", "~"))):
        return Path(value).name or value
    return value


def reference_text(run: RunConfig) -> str:
    """Which reference the policy was anchored to, in words."""
    plan, lora = plan_reference(run), run.model.lora
    if not plan.exists:
        return "none"
    sync = plan.sync
    moved = f", moved towards the policy (TR-DPO, alpha {sync.alpha:g}, every {sync.every} steps)" if sync else ""
    if run.reference.path is not None or lora is None:
        return f"`{shown_path(run.reference.path or run.model.path)}`{moved}"
    base = shown_path(run.model.path)
    if lora.path is not None and run.reference.adapter == "initial":
        return f"`{base}` with the adapter `{shown_path(lora.path)}`{moved}"
    return f"`{base}` without an adapter{moved}"


def identity_text(identity: Mapping[str, Any] | None) -> str:
    """What tells the reference from every other."""
    if not identity:
        return ""
    revision = f", revision `{identity['revision']}`" if identity.get("revision") else ""
    off = bias_text(identity.get("bias"))
    return f" ({identity['dtype']}, weights digest `{identity['weights']}`{revision}{off})"
