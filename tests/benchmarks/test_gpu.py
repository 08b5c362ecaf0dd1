"""The GPU benchmark's arithmetic, by hand and against a real model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import gpu, launches
from benchmarks.gpu import Case, trained_weights
from benchmarks.harness.inputs import Size, make_adapter, make_model, mixed_lengths
from benchmarks.harness.roofline import Peak, floor_of_step

PEAK = Peak(tflops=800.0, copy_gb_s=3000.0, link_gb_s=50.0, launch_us=5.0)
SIZE = Size(hidden=32, layers=2, heads=4, kv_heads=2, vocabulary=64, tied=False)


def test_shortest_step_by_hand() -> None:
    """16 TFLOP at 800 TFLOP/s are 20 ms; 1e9 weights of 28 bytes at 3,000 GB/s 9.3 ms, 4 bytes at 50 GB/s 80 ms."""
    floor = floor_of_step(flops=16e12, trained=1e9, peak=PEAK)
    assert floor.arithmetic_s == pytest.approx(0.020)
    assert floor.update_s == pytest.approx(28 / 3000)
    assert floor.step_s == pytest.approx(0.020 + 28 / 3000)
    assert floor_of_step(flops=16e12, trained=1e9, peak=PEAK, offloaded=True).update_s == pytest.approx(0.080)
    with pytest.raises(ValueError, match="no host link"):
        floor_of_step(flops=1.0, trained=1.0, peak=Peak(1.0, 1.0, None, 1.0), offloaded=True)


def test_trained_weights_are_the_models_matrices(tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", SIZE))
    matrices = sum(parameter.numel() for parameter in lm.parameters() if parameter.dim() > 1)
    assert trained_weights(Case(SIZE, {})) == matrices


def test_trained_weights_of_an_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapter = make_adapter(make_model(tmp_path / "model", SIZE), tmp_path / "adapter", rank=16)
    trained = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert trained_weights(Case(SIZE, {}, lora=True)) == trained


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main()


def test_layers_add_the_same_operators() -> None:
    one, two, three = (launches.operators(SIZE, layers) for layers in (1, 2, 3))
    for kind in ("forward", "whole"):
        assert three[kind] - two[kind] == two[kind] - one[kind] > 20
    assert two["whole"] > 2 * two["forward"]


def test_rows_hold_all_tokens_within_the_budget() -> None:
    lengths = mixed_lengths(32, prompt=20, response=9, longest=60)
    rows = launches.row_lengths(lengths, 128, 16)
    assert sum(rows) == (lengths.sum(1) - 2).sum(), "each response's last token is left out"
    assert max(rows) <= 128
