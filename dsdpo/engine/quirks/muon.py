"""DeepSpeed's Muon, made without its engine and with steps that are not compiled on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.muon import original_muon
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

COMPILED = ("muon_update", "zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz")


def make_muon(groups: list[dict[str, Any]], *, fused: bool | None) -> torch.optim.Optimizer:
    """Muon for groups with `use_muon`, torch's AdamW (`fused` or not) for the others.

    ZeRO orthogonalizes by the same mark on each parameter, which DeepSpeed sets only where its own JSON names Muon.
    """
    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    if get_accelerator().device_name() == "cpu":
        run_uncompiled()
    optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": fused})
    optimizer.defaults["lr"] = groups[0]["lr"]  # which transformers' polynomial schedule asks for
    return optimizer


def run_uncompiled() -> None:
    """Take torch.compile off the update: on a CPU it costs a C++ compilation for each shape, within the first step.

    DeepSpeed 0.19.8 compiles it wherever it runs; its stages import it by name when they step.
    """
    for name in COMPILED:
        function = getattr(original_muon, name)
        setattr(original_muon, name, getattr(function, "_torchdynamo_orig_callable", function))
