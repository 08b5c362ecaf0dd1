"""Inside the processes of `benchmarks.precompute`: what `dsdpo precompute` does, its scoring beside bare forwards.

python -m benchmarks.measured.precompute_ranks ROUNDS RUN.yaml                 (or under the deepspeed launcher)
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.recorder import VARIABLE, synchronize
from dsdpo.config.load import load_run, run_parser
from dsdpo.config.reference import Precomputed
from dsdpo.console import quiet_libraries
from dsdpo.distributed import barrier
from dsdpo.reference.base import build_checked_reference
from dsdpo.reference.identity import identify_reference
from dsdpo.reference.precomputed import ScoringJob, fill_tables, open_store_on_ranks
from dsdpo.run.plan import plan_run


class Recording:
    """An engine that remembers the batches it is given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.batches: list[Any] = []

    def __call__(self, batch: Any) -> torch.Tensor:
        self.batches.append(batch)
        return self.engine(batch=batch)


def main(argv: list[str]) -> int:
    """Score all pairs into a store of its own in each round, and make the bare forwards; the exit code."""
    rounds = int(argv[0])
    run, flags = load_run(argv[1:], run_parser("benchmarks.measured.precompute_ranks", "Scoring, timed."))
    quiet_libraries(verbose=False)
    plan = plan_run(run, run_file=flags.run, writes_output=False)
    settings = plan.reference.settings
    assert isinstance(settings, Precomputed)
    engine, _ = build_checked_reference(plan)
    identity = identify_reference(plan, engine.module, adapter=None)

    def scored(by: Any, name: str) -> Callable[[], Any]:
        store = open_store_on_ranks(plan.store_folder / name, identity)
        job = ScoringJob(by, settings.score_tokens, settings.audit_rows)
        return lambda: fill_tables(plan, job, store, dtype=identity.dtype)

    recording = Recording(engine)
    scored(recording, "warm-up")()

    @torch.no_grad()
    def bare() -> None:
        for batch in recording.batches:
            engine(batch=batch)

    order, results = random.Random(0), []
    for number in range(rounds):
        passes = {"precompute": scored(engine, f"round-{number}"), "bare": bare}
        results.append({name: timed(passes[name]) for name in order.sample(sorted(passes), 2)})
    report(results, pairs=len(plan.train.pairs))
    return 0


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """How long it takes, all ranks starting together."""
    barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronize()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def report(rounds: list[dict[str, dict[str, float]]], *, pairs: int) -> None:
    """Leave the figures of this rank where the benchmark looks for them."""
    folder = Path(json.loads(os.environ[VARIABLE])["folder"])
    rank = os.environ.get("RANK", "0")
    partial = folder / f"partial.{rank}"
    partial.write_text(json.dumps({"rounds": rounds, "pairs": pairs}))
    partial.replace(folder / f"result.{rank}")


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
