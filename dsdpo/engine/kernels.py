"""Optional kernels: what each needs of this machine, and Liger's put in place of a model's own modules.

Checked before any model loads; what would be passed over in silence is refused.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from transformers.integrations.liger import apply_liger_kernel

from dsdpo.config.model import ModelConfig
from dsdpo.engine.compiled_layers import KEY, compiler_refusal
from dsdpo.errors import ConfigError

LIGER = "model.use_liger_kernel"
FUSED = "model.output_head fused"
OF_THE_HEAD = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # which dsdpo's own head does


def refuse_kernels(model: ModelConfig, device: str) -> None:
    """Raise `ConfigError` if the settings ask for kernels that do not run on a kind of device, or are not installed."""
    if model.torch_compile and (refusal := compiler_refusal(device)):
        raise ConfigError(f"{KEY} {refusal}, or leave it out")
    wanted = [(LIGER, "liger_kernel", "liger-kernel", "liger")] if model.use_liger_kernel else []
    wanted += [(FUSED, "triton", "triton", "fused")] if model.output_head == "fused" else []
    for key, module, package, extra in wanted:
        if find_spec(module) is None:
            raise ConfigError(
                f"{key} needs {package}, which is not installed: pip install {package}, or 'dsdpo[{extra}]'"
            )
        interpreted = key == FUSED and os.environ.get("TRITON_INTERPRET") == "1"  # slow, and for tests
        if device == "cpu" and not interpreted:
            raise ConfigError(f"{key} runs on a GPU only, and this run is on the CPU: leave it out")


def refuse_liger_for(kind: str) -> None:
    """Raise `ConfigError` if Liger has no kernels for a model type, for which it would do nothing."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    if kind not in KNOWN:
        raise ConfigError(f"{LIGER}: Liger has no kernels for {kind} (it has for {', '.join(sorted(KNOWN))})")


def use_liger(lm: Any) -> None:
    """Have Liger's kernels compute the model's norms, rotary embeddings and gated MLPs."""
    refuse_liger_for(lm.config.model_type)
    apply_liger_kernel(lm, OF_THE_HEAD)
