"""All that a run imports, for the forkserver of tests/ranks.py: imported once, no group of ranks has to do it again."""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "datasets",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed asks for it at each start; it brings torch's compiler
    "peft",
    "torch",
    "transformers.models.llama.modeling_llama",
    "dsdpo.commands.precompute",
    "dsdpo.commands.train",
    "dsdpo.reference.adapter",
    "dsdpo.reference.precomputed",
    "dsdpo.reference.separate",
    "dsdpo.reference.trdpo",
)
for module in MODULES:
    importlib.import_module(module)
# None of this goes away, so the collector need not look at it in each rank, which would copy the pages it lies on.
gc.collect()
gc.freeze()
