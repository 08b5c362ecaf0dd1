"""The table of ds_configs/README.md: each of its rows fits, by the forecast for a model of that size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsdpo.config.run import RunConfig
from dsdpo.estimate.hardware import hardware
from dsdpo.estimate.seconds import Machine
from dsdpo.run.estimate import forecast_of, with_models
from dsdpo.run.plan import Layout
from tests.estimate.published import llama

CONFIGS = Path(__file__).parents[2] / "ds_configs"
HIDDEN_INNER_LAYERS_HEADS = {
    "8B": (4096, 14336, 32, 32),
    "32B": (5120, 27648, 64, 40),
    "70B": (8192, 28672, 80, 64),
}
LORA = {"r": 16, "target_modules": "all-linear"}
ROWS = [line for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith("| ") and " GB |" in line]


def test_the_table_is_there() -> None:
    assert len(ROWS) == 7


@pytest.mark.parametrize("row", ROWS)
def test_row_fits(row: str, tmp_path: Path) -> None:
    machine, size, trained, policy, reference, tokens, stated = (
        cell.strip().strip("`") for cell in row.split("|")[1:8]
    )
    count, memory = machine.removesuffix(" GB").rsplit(" x ", 1)
    nodes = int(count.split(" x ")[0]) if " x " in count else 1
    gpu = hardware({"80": "a100", "24": "rtx4090"}[memory], ranks_per_node=1)
    per_node = int(count.split(" x ")[-1])
    config = llama(*HIDDEN_INNER_LAYERS_HEADS[size])
    config.save_pretrained(tmp_path)
    run = RunConfig.model_validate(
        {
            "model": {"path": str(tmp_path), "lora": LORA if trained == "LoRA" else None},
            "data": {"train": "nowhere.jsonl"},
            "reference": {"score_tokens": int(tokens)}
            | ({} if reference == "the policy" else {"deepspeed": str(CONFIGS / reference)}),
            "batch": {"tokens_per_micro_batch": int(tokens)},
            "deepspeed": str(CONFIGS / policy),
            "output_dir": str(tmp_path / "run"),
        }
    )
    subject = with_models(
        run, "run.yaml", lengths=np.array([[512, 256, 256]]), layout=Layout("packed"), hidden_size=config.hidden_size
    )
    found = forecast_of(subject, Machine(gpu, nodes * per_node, per_node))
    assert found.fits
    assert stated.split(" (")[0] == f"{found.device / 2**30:.0f} GiB"
