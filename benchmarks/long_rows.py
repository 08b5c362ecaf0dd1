"""What a long row takes of memory: forward and backward of one pair, by its length, whole and split over ranks.

Each figure is from processes of their own, in which a short row has gone before, so that weights and gradients are
there: the highest resident memory of the long row's passes less the resident memory before them, of the rank with the
most.

    python -m benchmarks.long_rows [--lengths 1024 4096 16384 --layers 1 4]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Table, parser
from benchmarks.harness.processes import EXACT_MEMORY, end_with_children, environment
from benchmarks.harness.recorder import MIB

SHORT = 256  # tokens of the row that goes before
COLUMNS = ("layers", "tokens", "one rank, MiB", "KiB a token", "two ranks, MiB", "of one rank's", "MLP in tiles, MiB")


@dataclass(frozen=True)
class Point:
    """One measurement: a pair of `length` tokens, the prompt once, through a model of `layers` layers."""

    length: int
    layers: int
    ranks: int = 1
    tile: int | None = None  # model.mlp_tile_tokens
    checkpointing: bool = True


@dataclass(frozen=True)
class Taken:
    """What it took, of the rank with the most."""

    mib: float
    seconds: float


def main() -> None:
    """Measure and report."""
    options = parser("long_rows", "Memory of long rows.")
    options.add_argument(
        "--lengths", type=int, nargs="+", default=[2**power for power in range(10, 17)], help="tokens of the pair"
    )
    options.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    options.add_argument("--tile", type=int, default=1024, help="tokens of a tile of an MLP")
    given = options.parse_args()
    os.environ.update({**environment(), **EXACT_MEMORY})
    report = Report("long_rows", "Memory of long rows", given)
    end_with_children()
    rows = []
    try:
        for layers in given.layers:
            for length in given.lengths:
                taken = measured(length, layers, given)
                report.measured(f"{layers} layers, {length} tokens", {name: asdict(one) for name, one in taken.items()})
                rows.append(row(length, layers, taken))
                print(" | ".join(rows[-1]), flush=True)
    finally:  # a run that is stopped keeps what it has
        report.table(Table("A Llama of width 64 in float32, gradient checkpointing on", COLUMNS, tuple(rows), NOTE))
        report.write()


NOTE = (
    "Beside weights and gradients, of the rank with the most; the prompt is three quarters of the pair. At a width of "
    "64 in float32 a token's input of a layer is 0.25 KiB, which each further layer adds. In tiles: one rank, with "
    "model.mlp_tile_tokens."
)


def measured(length: int, layers: int, given: argparse.Namespace) -> dict[str, Taken]:
    """One row of the table."""
    points = {
        "one rank": Point(length, layers),
        "two ranks": Point(length, layers, ranks=2),
        "tiles": Point(length, layers, tile=given.tile),
    }
    return {name: measure(point) for name, point in points.items()}


def row(length: int, layers: int, taken: dict[str, Taken]) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    one, two, tiles = (taken[name].mib for name in ("one rank", "two ranks", "tiles"))
    return (
        str(layers),
        f"{length:,}",
        f"{one:.1f}",
        f"{1024 * one / length:.2f}",
        f"{two:.1f}",
        f"{two / one:.2f}",
        f"{tiles:.1f}",
    )


def measure(point: Point) -> Taken:
    """A point in processes of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "dsdpo.objective.logps"])
    with tempfile.TemporaryDirectory() as folder:
        answers: Queue[Taken] = context.Queue()
        arguments = (point, str(Path(folder) / "store"), answers)
        ranks = [context.Process(target=measure_here, args=(rank, *arguments)) for rank in range(point.ranks)]
        for process in ranks:
            process.start()
        found = [answers.get() for _ in ranks]
        for process in ranks:
            process.join()
    return Taken(max(one.mib for one in found), max(one.seconds for one in found))


def measure_here(rank: int, point: Point, store: str, answers: Queue[Taken]) -> None:
    """One rank's part of a point."""
    import torch

    torch.set_num_threads(1)
    if point.ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=point.ranks)
    scorer = make_scorer(point)
    score(scorer, SHORT)
    before, started = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the highest from here on
    score(scorer, point.length)
    answers.put(Taken((resident("VmHWM") - before) / MIB, time.perf_counter() - started))
    if point.ranks > 1:
        torch.distributed.barrier()


def make_scorer(point: Point) -> Any:
    """A Llama with random weights, ready to score packed rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dsdpo.objective.logps import ResponseScorer
    from dsdpo.objective.tiles import compute_in_tiles, mlps_of
    from dsdpo.sequence_group import sequence_group

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=point.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=131072,
    )
    lm = LlamaForCausalLM(config).train()
    lm.set_attn_implementation("dsdpo")
    if point.checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    for mlp in mlps_of(lm) if point.tile is not None else ():
        compute_in_tiles(mlp, point.tile or 0)
    return ResponseScorer(lm, sequence=sequence_group(point.ranks))


def score(scorer: Any, length: int) -> None:
    """Forward and backward of one pair of `length` tokens."""
    import numpy as np

    from dsdpo.data.packed_layout import collate_packed
    from dsdpo.data.pairs import Group

    prompt, response = 3 * length // 4, length // 8
    tokens = np.random.default_rng(0).integers(3, 512, size=prompt + 2 * response)
    batch = collate_packed([Group.of(0, tokens[:prompt], *np.split(tokens[prompt:], 2))])
    scorer(batch).sum().backward()


def resident(name: str) -> int:
    """Bytes of this process's memory, as /proc/self/status names them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
