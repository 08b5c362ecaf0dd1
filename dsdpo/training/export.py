"""The trained policy as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dsdpo
from dsdpo.config.load import dump_yaml
from dsdpo.config.reference_plan import plan_reference
from dsdpo.config.run import RunConfig
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import on_some_ranks, rank
from dsdpo.engine.lora import merged_model, save_adapter
from dsdpo.engine.shards import whole_state_dict
from dsdpo.engine.types import TrainingEngine


def export_model(
    policy: TrainingEngine, tokenizer: Tokenizer, run: RunConfig, folder: Path, *, metrics: dict[str, float]
) -> None:
    """Write whole weights (safetensors, in the engine's dtype), tokenizer and model card to `folder`. Collective.

    Of a policy with an adapter, that is the adapter alone; see `export_adapter`. Works from any ZeRO stage: parameters
    are gathered in bounded groups and only rank 0 keeps them, on the CPU.
    """
    lm = policy.module.lm
    if run.model.lora is not None:
        export_adapter(lm, tokenizer, run, folder, metrics=metrics)
        return
    state = whole_state_dict(lm, keep=rank() == 0)

    def write() -> None:
        lm.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(run, metrics), encoding="utf-8")

    on_some_ranks(rank() == 0, write)  # hundreds of gigabytes take longer than a collective may


def export_adapter(lm: Any, tokenizer: Tokenizer, run: RunConfig, folder: Path, *, metrics: dict[str, float]) -> None:
    """Write the adapter to `folder`, and if asked for, the merged model to `merged` beside it. Collective.

    Merging reads the base model anew: rank 0 needs room for one copy on the CPU, as it does to export a whole model.
    """
    save_adapter(lm, folder)

    def write() -> None:
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(run, metrics, library="peft"), encoding="utf-8")
        if run.export.merge_adapter:
            merged = folder.parent / "merged"
            merged_model(run.model, folder).save_pretrained(merged)
            tokenizer.save_pretrained(merged)
            (merged / "README.md").write_text(model_card(run, metrics), encoding="utf-8")

    on_some_ranks(rank() == 0, write)


def model_card(run: RunConfig, metrics: dict[str, float], *, library: str = "transformers") -> str:
    """A short model card: what was trained from what, how, and what came out."""
    results = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    table = f"\n## Last evaluation\n\n| metric | value |\n|---|---|\n{results}\n" if results else ""
    base = f"base_model: {run.model.path}\n" if not Path(run.model.path).exists() else ""
    lora = run.model.lora
    what = "" if lora is None else " with a LoRA adapter" if lora.path is None else f" with the adapter `{lora.path}`"
    return f"""---
library_name: {library}
tags: [dpo, dsdpo]
{base}---

# {Path(run.output_dir).name}

Trained from `{run.model.path}`{what} by Direct Preference Optimization
(loss: {run.loss.describe()}) against {reference_text(run)}, with dsdpo {dsdpo.__version__}.
{table}
## Settings

```yaml
{dump_yaml(run).strip()}
```
"""


def reference_text(run: RunConfig) -> str:
    """Which reference the policy was anchored to, in words."""
    lora = run.model.lora
    if not plan_reference(run).exists:
        return "no reference"
    if run.reference.path is not None or lora is None:
        return f"the reference `{run.reference.path or run.model.path}`"
    if lora.path is not None and run.reference.adapter == "initial":
        return f"the reference `{run.model.path}` with the adapter `{lora.path}`"
    return f"the reference `{run.model.path}` without an adapter"
