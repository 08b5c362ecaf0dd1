"""A model under ZeRO-3 that each rank fills by itself: bit for bit what transformers fills it with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tests.ranks import run_ranks
from tests.runs import REFERENCES
from tests.tiny import tiny_lm

CONFIG = {"train_micro_batch_size_per_gpu": 1, **REFERENCES["zero3"]}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"family": "qwen2", "tie_word_embeddings": True, "vocab_size": 99},  # which three ranks cannot share evenly
    "gemma2": {"family": "gemma2"},
    "mixtral": {"family": "mixtral"},  # its experts are merged on the way: left to transformers
    "without prefix": {"family": "gpt2"},
    "stored in bfloat16": {},
}


def saved(folder: Path, name: str, kind: dict[str, Any]) -> str:
    """A model in several files."""
    lm = tiny_lm(**kind)
    if name == "stored in bfloat16":
        lm = lm.bfloat16()
    stored = lm.base_model if name == "without prefix" else lm
    stored.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


def test_each_rank_fills_its_own_part(tmp_path: Path) -> None:
    paths = {name: saved(tmp_path / name, name, kind) for name, kind in KINDS.items()}
    for found in run_ranks(3, loaded_both_ways, paths):
        assert found == {name: {"read": name != "mixtral", "like transformers": True, "copied": True} for name in KINDS}


def loaded_both_ways(paths: dict[str, str]) -> dict[str, dict[str, bool]]:
    """Whether each model was read by parts, and every part and buffer is as loaded by transformers, read or copied."""
    return {name: compared(path) for name, path in paths.items()}


def compared(path: str) -> dict[str, bool]:
    from contextlib import nullcontext

    from dsdpo.config.model import ModelConfig
    from dsdpo.engine import load
    from dsdpo.engine.quirks import sharded_loading
    from dsdpo.engine.streamed import WeightFiles

    model = ModelConfig(path=path, dtype="float32")
    own, load.loading_own_shards = load.loading_own_shards, lambda like: nullcontext()  # type: ignore[assignment]
    try:
        expected = load.load_lm(model, copy.deepcopy(CONFIG), layout="padded")
    finally:
        load.loading_own_shards = own
    stretches: list[str] = []

    class Counted(WeightFiles):
        def read(self, name: str, first: int, count: int) -> torch.Tensor:
            stretches.append(name)
            return super().read(name, first, count)

    sharded_loading.WeightFiles = Counted  # type: ignore[misc]
    try:
        mine = load.load_lm(model, copy.deepcopy(CONFIG), layout="padded")
        read = bool(stretches)
        stretches.clear()
        copied = load.load_lm(model, copy.deepcopy(CONFIG), layout="padded", like=mine)
        buffers = {name for name, _ in mine.named_buffers()}
        assert not set(stretches) - buffers, "what lies in memory was read again"
    finally:
        sharded_loading.WeightFiles = WeightFiles  # type: ignore[misc]
    return {"read": read, "like transformers": same(mine, expected), "copied": same(copied, expected)}


def same(found: Any, expected: Any) -> bool:
    from dsdpo.engine.shards import own_elements

    for (name, ours), (other, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        if name != other or not torch.equal(own_elements(ours)[0], own_elements(theirs)[0]):
            return False
    buffers = zip(found.named_buffers(), expected.named_buffers(), strict=True)
    if not all(name == other and torch.equal(ours, theirs) for (name, ours), (other, theirs) in buffers):
        return False
    ours, theirs = found.generation_config.to_dict(), expected.generation_config.to_dict()
    return bool(found.config.to_dict() == expected.config.to_dict() and ours == theirs)
