"""What this machine's device can do at most: matrix products, copies in its memory, copies over the host link.

Other benchmarks are held against these figures rather than against a data sheet's. Without a GPU it is one CPU core's.

    python -m benchmarks.gpu_peak
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.harness.common import Report, Spread, Table, parser
from benchmarks.harness.processes import environment
from benchmarks.harness.recorder import on_cuda, synchronize
from benchmarks.harness.roofline import Peak

GIB = 2**30


def main() -> None:
    """Measure and report."""
    given = parser("gpu_peak", "The peak of this machine's device.", rounds=9, steps=10).parse_args()
    report = Report("gpu_peak", "What the device can do", given)
    rows, found = [], {}
    for name, (work, per_pass, unit) in passes().items():
        times = 100 * given.steps if name == LAUNCH else given.steps  # or the wait at the end would count for much
        speeds = [per_pass / seconds_of(work, times) for _ in range(given.rounds)]
        found[name] = Spread.of(speeds)
        rows.append((name, found[name].text(1 if speeds[0] > 10 else 2, f" {unit}")))
    title = torch.cuda.get_device_name() if on_cuda() else "CPU, one thread"
    note = f"Median [lowest, highest] of {given.rounds} rounds of {given.steps} passes."
    report.table(Table(title, ("what", "speed"), tuple(rows), note))
    peak = Peak(
        found[GEMM].median, found[COPY].median, found[LINK].median if LINK in found else None, 1 / found[LAUNCH].median
    )
    report.measured("peak", asdict(peak))
    report.write()


GEMM, COPY, LINK, BACK = "matrix product", "copy in memory", "host to device, pinned", "device to host, pinned"
LAUNCH = "small kernels"


def passes() -> dict[str, tuple[Callable[[], object], float, str]]:
    """What is run, how many units of work one run is, and the unit of speed."""
    device = torch.device("cuda" if on_cuda() else "cpu")
    torch.set_num_threads(1)
    size, dtype = (8192, torch.bfloat16) if on_cuda() else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    large = torch.zeros((2 if on_cuda() else 1) * GIB // 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(large)
    small = torch.zeros(8, device=device)
    found: dict[str, tuple[Callable[[], object], float, str]] = {
        GEMM: (lambda: torch.mm(left, right, out=product), 2 * size**3 / 1e12, "TFLOP/s"),
        COPY: (lambda: target.copy_(large), 2 * large.numel() / 1e9, "GB/s"),
        LAUNCH: (lambda: small.add_(1), 1e-6, "per µs"),
    }
    if on_cuda():
        host = torch.empty(large.numel(), dtype=torch.uint8, pin_memory=True)
        found[LINK] = (lambda: target.copy_(host, non_blocking=True), host.numel() / 1e9, "GB/s")
        found[BACK] = (lambda: host.copy_(large, non_blocking=True), host.numel() / 1e9, "GB/s")
    return found


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Seconds of one run of `work`, from `times` in a row after one more."""
    work()
    synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - started) / times


def measured_peak(folder: Path) -> Peak:
    """This device's peak, measured in a process of its own, whose memory is free afterwards."""
    out = folder / "peak.json"
    command = [sys.executable, "-m", "benchmarks.gpu_peak", "--rounds", "3", "--out", str(out)]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return Peak(**json.loads(out.read_text())["measured"]["peak"])


if __name__ == "__main__":
    main()
