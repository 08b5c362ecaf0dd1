"""The trained policy as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dsdpo
from dsdpo.config.load import dump_yaml
from dsdpo.config.run import RunConfig
from dsdpo.distributed import all_or_none, rank
from dsdpo.engine.shards import whole_state_dict


def export_model(policy: Any, tokenizer: Any, run: RunConfig, folder: Path, *, metrics: dict[str, float]) -> None:
    """Write whole weights (safetensors, in the engine's dtype), tokenizer and model card to `folder`. Collective.

    Works from any ZeRO stage: parameters are gathered in bounded groups and only rank 0 keeps them, on the CPU.
    """
    lm = policy.module.lm
    state = whole_state_dict(lm, keep=rank() == 0)
    with all_or_none():
        if state is not None:
            lm.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(model_card(run, metrics), encoding="utf-8")


def model_card(run: RunConfig, metrics: dict[str, float]) -> str:
    """A short model card: what was trained from what, how, and what came out."""
    results = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    table = f"\n## Last evaluation\n\n| metric | value |\n|---|---|\n{results}\n" if results else ""
    base = f"base_model: {run.model.path}\n" if not Path(run.model.path).exists() else ""
    return f"""---
library_name: transformers
tags: [dpo, dsdpo]
{base}---

# {Path(run.output_dir).name}

Trained from `{run.model.path}` by Direct Preference Optimization (loss `{run.loss.type}`, beta {run.loss.beta}) against
the reference `{run.reference.path or run.model.path}`, with dsdpo {dsdpo.__version__}.
{table}
## Settings

```yaml
{dump_yaml(run).strip()}
```
"""
