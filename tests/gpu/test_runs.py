"""Whole runs of the demo's model on this machine's device, under NCCL where that is a GPU."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import dequantized
from tests.gpu.support import DEVICE, ON_CUDA, RANKS
from tests.kill_test import Kill, Report, start
from tests.ranks import restart, stop_all
from tests.runs import POLICIES, losses, metrics, settings, train_on, write_json

LN_2 = math.log(2)
TRDPO = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}


def run_of(tmp_path: Path, inputs: Path, name: str, **options: Any) -> list[float]:
    """The losses of a run in a folder of its own."""
    return losses(train_on(RANKS, settings(tmp_path / name, inputs, **options)))


@pytest.mark.parametrize(
    ("policy", "reference", "dtype"),
    [
        ("zero1", "zero0", "bfloat16"),
        ("zero2", "zero0", "bfloat16"),
        ("zero3", "zero3", "bfloat16"),
        ("zero1_offload", "zero0", "bfloat16"),
        ("zero2_offload", "zero3_offload", "bfloat16"),
        ("zero3_offload", "zero3_offload", "bfloat16"),
        *([("zero2", "zero0", "float16"), ("zero3", "zero3", "float16")] if ON_CUDA else []),
    ]
    if ON_CUDA
    else [("zero3_offload", "zero3_offload", "bfloat16")],
)
def test_first_loss_is_ln_2_and_falls(policy: str, reference: str, dtype: str, tmp_path: Path, inputs: Path) -> None:
    found = run_of(
        tmp_path, inputs, "run", policy_zero=policy, reference_zero=reference, model={"dtype": dtype},
        train={"max_steps": 8, "overfit_first_step": True},
    )  # fmt: skip
    assert found[0] == pytest.approx(LN_2, abs=0.01)
    assert found[-1] < 0.6, "the same pairs again and again are learned by heart"


@pytest.mark.gpu
def test_strategies_and_layouts_agree(tmp_path: Path, inputs: Path, record_property: Any) -> None:
    """The same frozen weights and pairs give the same losses in float32, whatever asks for them."""
    separate = run_of(tmp_path, inputs, "separate")
    others = {
        "precomputed": run_of(tmp_path, inputs, "precomputed", reference={"strategy": "precomputed"}),
        "padded": run_of(tmp_path, inputs, "padded", data={"layout": "padded"}),
        "zero2": run_of(tmp_path, inputs, "zero2", policy_zero="zero2", reference_zero="zero0"),
        "offload": run_of(tmp_path, inputs, "offload", policy_zero="zero3_offload", reference_zero="zero3_offload"),
        "activations": run_of(tmp_path, inputs, "activations", model={"activation_offloading": True}),
        "checkpointing": run_of(tmp_path, inputs, "checkpointing", model={"gradient_checkpointing": True}),
    }
    lora: dict[str, Any] = {"model": {"lora": {"r": 4}}, "optimizer": {"learning_rate": 1e-2}}
    adapted = run_of(tmp_path, inputs, "beside LoRA", reference={"strategy": "separate"}, **lora)
    switched_off = run_of(tmp_path, inputs, "LoRA switched off", reference_zero=None, **lora)
    for name, found, expected in [
        *((name, found, separate) for name, found in others.items()),
        ("adapter", switched_off, adapted),
    ]:
        record_property(name, f"{max(abs(a - b) for a, b in zip(found, expected, strict=True)):.1e}")
        assert expected[-1] < LN_2 - 1e-3, "nothing was learned, so nothing was compared"
        assert found == pytest.approx(expected, abs=1e-4), name


@pytest.mark.gpu
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize(
    "options",
    [
        {"torch_compile": True, "gradient_checkpointing": True},
        {"use_liger_kernel": True},
        {"output_head": "fused"},
        {"attn_implementation": "flash_attention_4", "dtype": "bfloat16"},
    ],
    ids=["compiled", "liger", "fused head", "flash-attn 4"],
)
def test_kernels_that_a_run_can_choose(
    options: dict[str, Any], zero: str, tmp_path: Path, inputs: Path, record_property: Any
) -> None:
    """The losses of a run are those of one without; policy and reference compute alike."""
    needed = {"use_liger_kernel": "liger_kernel", "output_head": "triton", "attn_implementation": "flash_attn.cute"}
    for name in needed.keys() & options.keys():
        pytest.importorskip(needed[name], reason=f"{needed[name]} is not installed")
    chosen = ("torch_compile", "use_liger_kernel", "output_head", "attn_implementation")
    plain = {name: value for name, value in options.items() if name not in chosen}
    zeros: dict[str, Any] = {"policy_zero": zero, "reference_zero": "zero0"}
    expected = run_of(tmp_path, inputs, "plain", model=plain, **zeros)
    try:
        found = run_of(tmp_path, inputs, "chosen", model=options, **zeros)
    finally:
        restart(RANKS)  # Liger takes the place of transformers' functions in the process
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    record_property("largest difference of a loss", f"{worst:.1e}")
    assert expected[-1] < LN_2 - 1e-3, "nothing was learned, so nothing was compared"
    assert found == pytest.approx(expected, abs=0.02 if "dtype" in options else 1e-4)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"learning_rate": 1e-3},
    "lion": {"learning_rate": 1e-3},
    "muon": {"learning_rate": 1e-2, "adam_learning_rate": 1e-3},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_learn_alike_at_every_stage(kind: str, tmp_path: Path, inputs: Path, record_property: Any) -> None:
    """Kernels of bitsandbytes (8-bit states, Lion) and Muon's compiled steps, with float32 sums as in our JSONs."""
    if kind in ("adamw_8bit", "lion"):
        pytest.importorskip("bitsandbytes")
    optimizer = {"type": kind, "lr_scheduler_type": "constant", **OPTIMIZERS[kind]}
    found = {}
    for zero in ("zero1", "zero2", "zero3"):
        config = {**POLICIES[zero], "data_types": {"grad_accum_dtype": "fp32"}}
        found[zero] = run_of(
            tmp_path, inputs, zero, reference_zero="zero0", model={"dtype": "bfloat16"}, optimizer=optimizer,
            train={"max_steps": 8, "overfit_first_step": True}, deepspeed=write_json(tmp_path / "p.json", config),
        )  # fmt: skip
        assert found[zero][0] == pytest.approx(LN_2, abs=0.01)
        assert found[zero][-1] < 0.62, "the same pairs again and again are learned by heart"
    apart = max(abs(a - b) for zero in found for a, b in zip(found[zero], found["zero1"], strict=True))
    record_property("largest difference of a loss", f"{apart:.1e}")
    assert apart < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_base_in_4_bits_learns_as_the_weights_that_it_stands_for(
    zero: str, tmp_path: Path, inputs: Path, record_property: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    lora: dict[str, Any] = {"lora": {"r": 4}}
    options: dict[str, Any] = {"policy_zero": zero, "reference_zero": None, "optimizer": {"learning_rate": 1e-2}}
    base = dequantized(tmp_path / "base", inputs / "model")
    expected = run_of(tmp_path, inputs, "plain", model={**lora, "path": base}, **options)
    found = run_of(tmp_path, inputs, "bits", model={**lora, "quantization": {"bits": 4}}, **options)
    apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    record_property("largest difference of a loss", f"{apart:.1e}")
    assert found[0] == pytest.approx(LN_2, abs=1e-5)
    assert expected[-1] < LN_2 - 1e-3, "nothing was learned, so nothing was compared"
    assert apart < 1e-3


@pytest.mark.gpu
def test_rows_split_over_gpus(tmp_path: Path, inputs: Path) -> None:
    if RANKS < 2:
        pytest.skip("needs two GPUs")
    whole = run_of(tmp_path, inputs, "whole")
    split = run_of(tmp_path, inputs, "split", distributed={"sequence_parallel": 2})
    assert split == pytest.approx(whole, abs=1e-4)


@pytest.mark.gpu
def test_killed_rank_ends_the_run_and_it_resumes(tmp_path: Path, inputs: Path) -> None:
    """SIGKILL of the last rank between two steps: the others wait in NCCL, and end by themselves."""
    run = settings(
        tmp_path, inputs, policy_zero="zero3",
        train={"max_steps": 30, "num_train_epochs": 9}, checkpoint={"every_steps": 2}, distributed={"lost_after": 20},
    )  # fmt: skip
    stop_all()  # ranks of the pool hold memory on the same GPUs
    started, report = start(run, tmp_path, ranks=RANKS), Report()
    hit = started.interrupt(Kill("train", "rank 1" if RANKS == 2 else "rank 0", rows=4), Path(run["output_dir"]))
    assert hit["hit"] > 0
    assert started.finish(report) != 0
    assert start(run, tmp_path, ranks=RANKS).finish(report) == 0
    if RANKS == 2:
        assert "died or lost the connection" in report.outputs[0]
    assert "resumed from" in report.outputs[1]
    steps = [row["step"] for row in metrics(Path(run["output_dir"])) if "loss" in row]
    assert steps == list(range(1, 31))


def test_reference_that_becomes_the_policy_each_step(tmp_path: Path, inputs: Path) -> None:
    """TR-DPO with α 1 after every step under ZeRO-3: each loss is ln 2 if the copy and the next pass are in order."""
    steps = 100 if ON_CUDA else 6
    found = run_of(tmp_path, inputs, "run", reference=TRDPO, train={"max_steps": steps, "num_train_epochs": 50})
    assert len(found) == steps
    assert found == pytest.approx([LN_2] * steps, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw", *OPTIMIZERS])
def test_resumed_run_is_the_uninterrupted_one_to_rounding(kind: str, tmp_path: Path, inputs: Path) -> None:
    if kind in ("adamw_8bit", "lion"):
        pytest.importorskip("bitsandbytes")
    optimizer = {"type": kind, **OPTIMIZERS.get(kind, {})}
    bf16: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "optimizer": optimizer}
    whole = run_of(tmp_path, inputs, "whole", train={"max_steps": 8}, **bf16)
    part: dict[str, Any] = {"checkpoint": {"every_steps": 4, "resume": "auto"}, **bf16}
    run = settings(tmp_path / "part", inputs, train={"max_steps": 8}, **part)
    (Path(run["output_dir"])).mkdir(parents=True)
    (Path(run["output_dir"]) / "STOP").touch()
    train_on(RANKS, run)
    resumed = losses(train_on(RANKS, run))
    assert resumed == pytest.approx(whole, abs=0.02)


@pytest.mark.gpu
def test_memory_stays_flat_over_200_steps(tmp_path: Path, inputs: Path, record_property: Any) -> None:
    rows = train_on(
        RANKS,
        settings(tmp_path, inputs, train={"max_steps": 200, "num_train_epochs": 50}, model={"dtype": "bfloat16"}),
    )
    peaks = [row["memory/peak_gib"] for row in rows if "memory/peak_gib" in row]
    record_property("peak GiB at step 20 / 200", f"{peaks[19]:.3f} / {peaks[-1]:.3f}")
    assert peaks[-1] <= peaks[19] * 1.01 + 0.001


def test_no_micro_batch_waits_for_the_device(tmp_path: Path, inputs: Path, record_property: Any) -> None:
    """As many reads of a device's number, and waits for the device, with 8 micro-batches a step as with 2."""
    counts = {
        pairs: waits(tmp_path / f"{pairs}", inputs, pairs_per_micro_batch=pairs, pairs_per_step=8 * RANKS)
        for pairs in (4, 1)
    }
    record_property("with 2 micro-batches", dict(counts[4]))
    record_property("with 8", dict(counts[1]))
    assert sum(counts[4].values()) > 0, "a step reads something"
    assert counts[1] == counts[4]


WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def waits(folder: Path, inputs: Path, **batch: int) -> Counter[str]:
    """What one profiled step waited for on rank 0."""
    run = settings(
        folder, inputs, policy_zero="zero2", reference_zero="zero0", batch=batch, tracking={"profile_steps": [3, 4]}
    )
    train_on(RANKS, run)
    (trace,) = Path(run["output_dir"]).rglob("rank-0.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("ph") == "X" and event["name"] in WAITS)


@pytest.mark.gpu
def test_exported_model_answers_on_the_gpu(tmp_path: Path, inputs: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = settings(tmp_path, inputs, model={"dtype": "bfloat16"}, train={"max_steps": 6})
    train_on(RANKS, run)
    exported = AutoModelForCausalLM.from_pretrained(Path(run["output_dir"]) / "model").to(DEVICE)
    before = AutoModelForCausalLM.from_pretrained(run["model"]["path"]).to(DEVICE)
    ids = torch.arange(3, 20, device=DEVICE)[None]
    after, first = exported(ids).logits, before(ids).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(after.float(), first.float())
