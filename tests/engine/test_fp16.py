"""float16 with loss scaling, which DeepSpeed refuses on a CPU: with its answer patched the same code runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines import planned, policy_of, train_steps
from tests.ranks import run_ranks
from tests.runs import demo_inputs, settings, write_json
from tests.tiny import random_batch


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def exact(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank finds in float32, which stages change by far less than float16 does."""
    run = settings(tmp_path_factory.mktemp("fp32"), inputs, policy_zero="zero2", reference_zero=None)
    return run_ranks(2, train_here, run, {})


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_float16_trains_as_float32_does_and_skips_what_overflows(
    stage: str, exact: list[dict[str, Any]], inputs: Path, tmp_path: Path
) -> None:
    half = settings(tmp_path / "fp16", inputs, policy_zero=stage, reference_zero=None, model={"dtype": "float16"})
    for scaled, plain in zip(run_ranks(2, train_here, half, {"initial_scale_power": 10}), exact, strict=True):
        assert scaled["skipped"] == 0
        assert scaled["margins"] == pytest.approx(plain["margins"], rel=5e-3)
    for overflowed in run_ranks(2, train_here, half, {"initial_scale_power": 40, "hysteresis": 1}):
        skipped = overflowed["skipped"]
        assert 1 <= skipped < 5
        assert overflowed["scale"] < 2.0**40
        assert len(set(overflowed["margins"][: skipped + 1])) == 1, "a skipped step moved the weights"
        assert overflowed["margins"][-1] != overflowed["margins"][0], "no step was taken once the scale had come down"


def train_here(run: dict[str, Any], fp16: dict[str, Any]) -> dict[str, Any]:
    """Margins of five steps on one batch, steps that were skipped and the loss scale at the end."""
    import json

    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    path = Path(run["deepspeed"])
    if fp16:
        own = path.with_name(f"fp16-{fp16['initial_scale_power']}.json")
        write_json(own, json.loads(path.read_text()) | {"fp16": {"enabled": "auto", **fp16}})
        run = run | {"deepspeed": str(own)}
    accelerator.is_fp16_supported = lambda: True
    try:
        policy = policy_of(planned(run))
        margins = train_steps(policy, [random_batch(3, vocab=60, seed=3)] * 5)
    finally:
        del accelerator.is_fp16_supported
    scale = getattr(policy.optimizer, "cur_scale", None) or getattr(policy.optimizer, "loss_scale", 1.0)
    return {"margins": margins, "skipped": policy.skipped_steps, "scale": float(scale)}
