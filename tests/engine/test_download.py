"""A Hub model is downloaded once per node before any rank loads it, and the others wait for it."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from tests.ranks import run_ranks


def test_first_rank_of_a_node_downloads_and_the_others_wait() -> None:
    first, second = run_ranks(2, fetch_here)
    assert first["asked"] == [("some/model", "main", True)]
    assert second["asked"] == []
    assert min(first["waited"], second["waited"]) >= 1.5


def fetch_here() -> dict[str, Any]:
    import huggingface_hub

    from dsdpo.config.model import ModelConfig
    from dsdpo.engine import download

    asked = []

    def slow(repository: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repository, revision, "*.safetensors" in allow_patterns and "*.bin" not in allow_patterns))
        time.sleep(1.5)
        return "."

    kept = huggingface_hub.snapshot_download, download.is_offline_mode
    huggingface_hub.snapshot_download, download.is_offline_mode = slow, lambda: False
    try:
        dist.barrier()
        started = time.monotonic()
        download.fetch_model(ModelConfig(path="some/model", revision="main"))
        waited = time.monotonic() - started
        download.fetch_model(ModelConfig(path="."))
    finally:
        huggingface_hub.snapshot_download, download.is_offline_mode = kept
    return {"asked": asked, "waited": waited}
