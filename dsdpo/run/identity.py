"""Which reference a run has: found out once its weights are loaded, said, and written into the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsdpo.console import say
from dsdpo.distributed import all_or_none, rank
from dsdpo.reference.base import Reference
from dsdpo.reference.identity import ReferenceIdentity, identify
from dsdpo.run.plan import Plan, reference_model


def identify_reference(plan: Plan, module: Any, *, adapter: str | None) -> ReferenceIdentity:
    """Which reference stands in `module`, as it is when training starts; `adapter` is its own, if any. Collective."""
    run = plan.run
    settings = run.reference
    moves = f"moves every {settings.ref_model_sync_steps} steps, alpha {settings.ref_model_mixup_alpha}"
    return identify(
        module,
        model=reference_model(run),
        tokenizer=plan.tokenizer,
        max_length=run.data.max_length,
        strategy=run.reference_strategy(),
        engine_config=plan.reference_config,
        adapter=adapter,
        sync=moves if settings.sync_ref_model else None,
    )


def record_identity(reference: Reference, folder: Path, *, overridden: list[str]) -> dict[str, Any]:
    """Say which reference this is, write it into the run folder, and return it as JSON. Collective.

    `overridden` says in what it is not the one that training began with.
    """
    assert reference.identity is not None
    say(f"reference: {reference.identity.describe()}")
    content = reference.identity.to_json() | ({"overridden": overridden} if overridden else {})
    with all_or_none():
        if rank() == 0:
            (folder / "identity.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content
