"""Environment of all tests: CPU, one thread a rank, offline, an extension cache of the project's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    from tests.ranks import stop_all

    stop_all()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data, a small real model and TRL's trajectories, where they are present."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: this test needs the data, model and trajectories kept there")
    return SHARED
