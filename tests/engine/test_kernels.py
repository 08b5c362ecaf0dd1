"""Optional kernels are refused before a model loads where they would not run, or would do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dsdpo.config.model import ModelConfig
from dsdpo.engine import kernels
from dsdpo.engine.kernels import refuse_kernels, refuse_liger_for, use_liger
from dsdpo.errors import ConfigError
from tests.tiny import tiny_lm

FUSED: dict[str, Any] = {"output_head": "fused"}
LIGER: dict[str, Any] = {"use_liger_kernel": True}


@pytest.mark.parametrize(("options", "package"), [(FUSED, "triton"), (LIGER, "liger-kernel")])
def test_refused_without_the_package_or_a_gpu(
    options: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = ModelConfig(path="model", **options)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"needs {package}, which is not installed: pip install {package}"):
        refuse_kernels(model, "cuda")
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="runs on a GPU only, and this run is on the CPU: leave it out"):
        refuse_kernels(model, "cpu")
    refuse_kernels(model, "cuda")
    refuse_kernels(ModelConfig(path="model"), "cpu")


def test_liger_takes_norms_and_mlps_and_leaves_the_head() -> None:
    """Which kernels take the place of what; tests/gpu computes with them."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    with pytest.raises(ConfigError, match="Liger has no kernels for gpt2"):
        refuse_liger_for("gpt2")
    import transformers.models.qwen2.modeling_qwen2 as module

    before = {name: getattr(module, name) for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP")}
    lm = tiny_lm("qwen2")
    head, forward = lm.get_output_embeddings(), lm.forward
    try:
        use_liger(lm)
        layer = lm.model.layers[0]
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, lm.model.norm):
            assert part.forward.__module__.startswith("liger_kernel"), part
        assert module.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
        assert lm.forward == forward
        assert lm.get_output_embeddings() is head
        assert "forward" not in vars(head)
    finally:
        for name, value in before.items():
            setattr(module, name, value)
