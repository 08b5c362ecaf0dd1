"""What a log line says of speed, memory and gathers: present, consistent, and equal to what was counted otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsdpo.run.summary import describe_results
from dsdpo.training.perf import ASIDE, PHASES, DeviceLaps, Laps, peak_memory, peak_tflops
from tests.gathers import counting
from tests.ranks import run_ranks
from tests.runs import metrics, settings, train_here

PEAK = 0.5  # TFLOP/s, made up


def test_time_between_two_phases_counts_to_the_second() -> None:
    readings = iter([10.0, 12.0, 12.5, 17.0, 20.0, 21.0])
    laps = Laps(lambda: next(readings))
    for phase in ("data", "reference", "data"):
        laps.mark(phase)
    assert laps.take() == {"data": 6.5, "reference": 0.5}
    laps.mark("log")
    laps.mark("data")
    assert laps.take() == {"log": 3.0, "data": 1.0}


@pytest.mark.gpu
def test_phases_are_timed_on_the_device() -> None:
    """A phase that only queues work has the work's time, and the wait for it has none."""
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    laps = DeviceLaps()
    for _ in range(20):
        matrix = (matrix @ matrix).tanh()
    laps.mark("work")
    torch.cuda.synchronize()
    laps.mark("wait")
    seconds = laps.take()
    assert seconds["work"] > seconds["wait"] > 0
    assert laps.take() == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_peak_memory_is_what_was_held_at_most() -> None:
    before = peak_memory(torch.device("cpu"))
    block = np.ones(before // 8 + 2**20)
    assert peak_memory(torch.device("cpu")) >= block.nbytes > before
    del block
    assert peak_memory(torch.device("cpu")) > before


def train_and_count(run: dict[str, Any]) -> dict[str, Any]:
    """Train; beside it gathers counted in another way, each step's operations, and the reference's parameters."""
    from transformers import AutoModelForCausalLM

    from dsdpo.config.run import RunConfig
    from dsdpo.engine.quirks.gather_trace import GATHERED
    from dsdpo.objective.flops import model_flops, step_flops
    from dsdpo.run.plan import plan_run

    # DeepSpeed is tried on a tiny model, once in a process for each config: here, not among the gathers that count.
    plan = plan_run(RunConfig.model_validate(run), writes_output=False)
    before = GATHERED.parameters
    with counting() as events:
        train_here(run)
    lm = AutoModelForCausalLM.from_pretrained(run["model"]["path"])
    flops = model_flops(lm)
    windows = list(plan.training_windows(torch.device("cpu")))
    return {
        "gathered": GATHERED.parameters - before,
        "events": events["gathered"],
        "flops": [step_flops(window.lengths, flops, flops) for window in windows],
        "tokens": [window.tokens for window in windows],
        "computed": [sum(batch.num_tokens for batch in window.batches) for window in windows],
        "modules": [
            (len(own), sum(parameter.numel() for parameter in own))
            for module in lm.modules()
            if (own := list(module.parameters(recurse=False)))
        ],
    }


@pytest.mark.parametrize(("micro_batches", "layout"), [(1, "padded"), (4, "auto")])
def test_a_run_logs_throughput_memory_and_communication(
    micro_batches: int, layout: str, inputs: Path, tmp_path: Path
) -> None:
    run = settings(
        tmp_path,
        inputs,
        data={"layout": layout, "eval": str(inputs / "few.jsonl")},
        batch={"pairs_per_step": 16, "pairs_per_micro_batch": 8 // micro_batches},
        train={"max_steps": 3},
        evaluation={"every_steps": 2, "at_start": False},
        checkpoint={"every_steps": 2},
        tracking={"peak_tflops": PEAK},
    )
    first, second = run_ranks(2, train_and_count, run)
    folder = Path(run["output_dir"])
    rows = [row for row in metrics(folder) if "loss" in row]
    # Each module with parameters is gathered once per step by the reference, however many micro-batches there are, and
    # twice per micro-batch by the policy. The demo's output head shares its weight with the embedding: once for each.
    parameters = sum(count for count, _ in first["modules"])
    elements = sum(size for _, size in first["modules"])
    assert [row["comm/reference_gathers"] for row in rows] == [parameters] * 3
    assert [row["comm/gathers"] for row in rows] == [(1 + 2 * micro_batches) * parameters] * 3
    assert rows[0]["comm/reference_gathered_gib"] == pytest.approx(4 * elements / 2**30)
    assert rows[0]["comm/gathered_gib"] == pytest.approx((1 + 2 * micro_batches) * 4 * elements / 2**30)
    assert first["gathered"] == first["events"] > 0
    for index, row in enumerate(rows):
        assert sum(row[f"time/{phase}_s"] for phase in PHASES) == pytest.approx(row["time/step_s"], rel=1e-9)
        # The first row cannot know how long it takes to write itself.
        assert [phase for phase in PHASES if not row[f"time/{phase}_s"]] == ([] if index else ["log", "other"])
        model = row["time/reference_s"] + row["time/forward_backward_s"]
        assert row["perf/overhead_share"] == pytest.approx(1 - model / row["time/step_s"])
        computed = first["computed"][index] + second["computed"][index]
        assert row["perf/sharing_ratio"] == pytest.approx(first["tokens"][index] / computed)
        assert row["perf/padding_share"] == pytest.approx(1 - row["perf/sharing_ratio"] if layout == "padded" else 0)
        assert row["perf/tokens_per_s"] == pytest.approx(first["tokens"][index] / row["time/step_s"])
        assert row["perf/tokens_per_s"] == pytest.approx(2 * row["perf/tokens_per_s_per_device"])
        assert row["perf/pairs_per_s"] == pytest.approx(16 / row["time/step_s"])
        per_device = first["flops"][index] / row["time/step_s"] / 2 / 1e12
        assert row["perf/tflops_per_device"] == pytest.approx(per_device)
        assert row["perf/mfu"] == pytest.approx(per_device / PEAK)
        assert 1.0 <= row["perf/imbalance"] < 1.5
        assert row["time/slowest_rank"] in (0.0, 1.0)
        assert 0 <= row["perf/imbalance_s"] < row["time/step_s"]
        assert row["memory/peak_gib"] > 0
    assert re.search(r"pairs/s, [\d,]+ tokens/s \(\d+% of the devices' peak\), \d", describe_results(folder))
    asides = [{phase for phase in ASIDE if f"time/{phase}_s" in row} for row in rows]
    assert asides == [set(), set(), {"evaluate", "save"}], "what followed step 2 stands in the row after it"


def test_without_a_known_peak_there_is_no_share_of_it(inputs: Path, tmp_path: Path) -> None:
    """Nor does a precomputed reference gather anything or count as work while training."""
    run = settings(
        tmp_path, inputs, reference={"strategy": "precomputed"}, train={"max_steps": 2}, tracking={"every_steps": 2}
    )
    [counted, _] = run_ranks(2, train_and_count, run)
    row = metrics(Path(run["output_dir"]))[-1]
    assert "perf/mfu" not in row
    assert row["comm/reference_gathers"] == 0 < row["comm/gathers"]
    with_reference = counted["flops"][1] / row["time/step_s"] / 2 / 1e12
    assert row["perf/tflops_per_device"] == pytest.approx(0.75 * with_reference, rel=1e-9)


def straggling_here() -> dict[str, float]:
    """The figures of a rank that computes for 3 s a step beside one that does for 1 s, in two steps."""
    from dsdpo.distributed import rank
    from dsdpo.training.perf import Perf

    perf = Perf(torch.device("cpu"), step_flops=lambda lengths: 0.0)
    perf._steps = 2
    return perf._stragglers(6.0 if rank() == 1 else 2.0)


def test_the_rank_that_others_wait_for_is_named() -> None:
    assert run_ranks(2, straggling_here) == [{"time/slowest_rank": 1.0, "perf/imbalance_s": 1.0}] * 2


def stalled_here() -> list[float]:
    """Seconds that count as waiting: only within a pass over a model, and only once."""
    import time

    from dsdpo.engine.quirks.gather_trace import STALLS
    from dsdpo.training.perf import Perf

    perf = Perf(torch.device("cpu"), step_flops=lambda lengths: 0.0)
    STALLS.take()
    for phase in ("forward_backward", "evaluate"):
        with perf.phase(phase), STALLS.counted():
            time.sleep(0.05)
    return [STALLS.take(), STALLS.take()]


def test_waiting_for_gathers_counts_within_passes_of_a_step_only() -> None:
    for waited, again in run_ranks(2, stalled_here):
        assert waited >= 0.05
        assert again == 0.0
