"""Inside a measured process: what two training steps take in memory, by whom it belongs to and at their peak.

    python -m benchmarks.measured.memory_side RUN.yaml OUT_FOLDER                  (or under the deepspeed launcher)

Resident memory has the interpreter and libraries in it, which are larger than the models that fit a benchmark. Here
storages that are alive between steps are counted by whom they belong to; what comes and goes within steps is the rise
of the kernel's peak of resident memory, under a malloc that gives every larger block back at once. (torch's profiler
does not see what other threads free: gloo's give back the copies that reductions make, and would be counted as kept.)
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.harness.recorder import forget_peak, give_back_memory, held_memory, peak_memory
from dsdpo.config.load import load_run, run_parser
from dsdpo.console import quiet_libraries
from dsdpo.distributed import rank
from dsdpo.engine.build import device
from dsdpo.run.models import build_policy_and_reference
from dsdpo.run.plan import plan_run
from dsdpo.training.metrics import Meter
from dsdpo.training.step import train_step
from dsdpo.training.step_loss import StepLoss

WARMUP = 2  # steps after which optimizer states exist and ZeRO-3 has its trace of gathers


def main(argv: list[str]) -> int:
    """Train a few steps and write what they took; the exit code."""
    *words, out = argv
    run, flags = load_run(words, run_parser("benchmarks.measured.memory_side", "The memory of a run's steps."))
    quiet_libraries(verbose=False)
    plan = plan_run(run, run_file=flags.run)
    policy, reference = build_policy_and_reference(plan)
    loss = StepLoss(run.loss, total_steps=plan.total_steps, means={}, score_tokens=run.reference.score_tokens)
    scored = reference.along(plan.training_windows(device()), after=0)

    def steps(count: int) -> None:
        for window, anchor in islice(scored, count):
            train_step(policy, anchor, loss, window, Meter())
            reference.after_step(1)

    steps(WARMUP)
    give_back_memory()
    parts, before = by_owner(policy, reference), held_memory()
    forget_peak()
    steps(2)
    found = {"parts": parts, "static": sum(parts.values()), "rise": peak_memory() - before}
    (Path(out) / f"memory-{rank()}.json").write_text(json.dumps(found))
    return 0


def by_owner(policy: Any, reference: Any) -> dict[str, int]:
    """Bytes of all storages alive, each counted once, by the first of these that holds it."""
    seen: set[int] = set()
    found = {}
    engine = getattr(getattr(reference, "inner", reference), "engine", None)
    averages = getattr(getattr(reference, "average", None), "averages", {})
    owners: list[tuple[str, Iterator[Tensor]]] = [
        ("policy weights", weights(policy.module)),
        ("reference weights", weights(engine.module) if engine is not None else iter(())),
        ("moving average", iter(averages.values())),
        ("optimizer", optimizer_states(policy.optimizer)),
        ("gradients and buffers", (held for held in gc.get_objects() if type(held) in (Tensor, nn.Parameter))),
    ]
    for name, tensors in owners:
        found[name] = 0
        for tensor in tensors:
            if tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[name] += storage.nbytes()
    return found


def weights(module: nn.Module) -> Iterator[Tensor]:
    """A module's parameters as this rank holds them, and what it has gathered of others."""
    for parameter in module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
        yield parameter.detach()


def optimizer_states(optimizer: Any) -> Iterator[Tensor]:
    """Master weights and states."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        yield from (parameter.detach() for parameter in group["params"])
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        yield from (part.detach() for part in getattr(optimizer, name, ()))


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
