"""A measured run of TRL's DPOTrainer: the only file here that imports trl, which `pip install '.[bench]'` brings.

python -m benchmarks.measured.trl_side SETTINGS.json                           (or under accelerate launch)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer

from benchmarks.harness.recorder import Recorder, on_cuda


class Report(TrainerCallback):
    """Tells the recorder of each optimizer step and its loss."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called on every rank."""
        self.recorder.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called after each step, as every step is logged."""
        if logs and "loss" in logs:
            self.recorder.loss(float(logs["loss"]))


def main(path: str) -> None:
    """Train as the settings say."""
    settings = json.loads(Path(path).read_text())
    if settings["compact_head"]:
        # What TRL does on CUDA: only response positions go through the head. On a CPU it projects every position.
        trl.trainer.utils._use_triton = lambda device: True
    recorder = Recorder()
    trainer = DPOTrainer(
        model=settings["model"],
        args=DPOConfig(
            **settings["arguments"],
            model_init_kwargs={"dtype": settings["dtype"]},
            bf16=settings["dtype"] == "bfloat16",
            # Without CUDA accelerate drops DeepSpeed where a CPU is asked for, and counts one rank where no backend is.
            use_cpu=not on_cuda() and not settings["deepspeed"],
            ddp_backend="gloo" if settings["deepspeed"] and not on_cuda() else None,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        peft_config=adapter_config(settings["adapter"]) if settings["adapter"] else None,
        callbacks=[Report(recorder)],
    )
    if settings["adapter"]:
        load_adapter(trainer.model, Path(settings["adapter"]))
    trainer.train()


def adapter_config(folder: str) -> LoraConfig:
    """The adapter's settings, for a fresh adapter of the same shape."""
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def load_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Put the adapter's weights in place of the fresh ones, partitioned or not. Collective."""
    weights = load_file(folder / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameter = parameters[name.replace(".weight", ".default.weight")]
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)


if __name__ == "__main__":
    main(sys.argv[1])
