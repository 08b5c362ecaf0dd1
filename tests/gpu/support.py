"""The device of the tests in this folder: CUDA under `make gpu` on a machine that has it, else the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

ON_CUDA = os.environ.get("DS_ACCELERATOR") == "cuda"
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
RANKS = min(2, torch.cuda.device_count()) if ON_CUDA else 1  # one GPU is enough, two say more


def distance(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))
