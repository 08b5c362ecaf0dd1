"""Inside the processes of `benchmarks.precompute`: `dsdpo precompute`, with its scoring timed against bare forwards.

python -m benchmarks.measured.precompute_ranks ROUNDS RUN.yaml                 (or under the deepspeed launcher)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.recorder import VARIABLE, synchronize
from dsdpo.__main__ import main as run_command
from dsdpo.distributed import barrier
from dsdpo.reference import precomputed


class Recording:
    """An engine that remembers the batches it is given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.batches: list[Any] = []

    def __call__(self, batch: Any) -> torch.Tensor:
        self.batches.append(batch)
        return self.engine(batch=batch)


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    rounds = int(argv[0])
    fill_tables = precomputed.fill_tables

    def fill_and_compare(plan: Any, scorer: Any, folder: Path, **options: Any) -> Any:
        recording = Recording(scorer.engine)

        def whole(number: int) -> Callable[[], Any]:
            store = folder.with_name(f"{folder.name}-{number}")
            if int(os.environ.get("RANK", "0")) == 0:
                shutil.copytree(folder, store)  # an empty store of this reference
            barrier()
            return lambda: fill_tables(plan, scorer, store, **options)

        @torch.no_grad()
        def bare() -> None:
            for batch in recording.batches:
                scorer.engine(batch=batch)

        stores = [whole(number) for number in range(rounds)]
        filled = fill_tables(plan, replace(scorer, engine=recording), folder, **options)  # warm-up
        order = random.Random(0)
        results = []
        for store in stores:
            passes = {"precompute": store, "bare": bare}
            results.append({name: timed(passes[name]) for name in order.sample(sorted(passes), 2)})
        report(results, pairs=len(plan.train.pairs))
        return filled

    precomputed.fill_tables = fill_and_compare
    return run_command(["precompute", *argv[1:]])


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
