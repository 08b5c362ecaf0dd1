"""The arithmetic of a training run and nothing else: its engines, in a loop over batches that were made before.

python -m benchmarks.measured.bare RUN.yaml                                    (or under the deepspeed launcher)
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from benchmarks.harness.recorder import Recorder
from dsdpo.config.load import load_run, run_parser
from dsdpo.console import quiet_libraries
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.collate import group_by_tokens, merge
from dsdpo.data.steps import StepBatches
from dsdpo.distributed import max_over_ranks, world_size
from dsdpo.engine.build import device
from dsdpo.reference.separate import SeparateReference
from dsdpo.run.models import build_policy_and_reference
from dsdpo.run.plan import plan_run


def main(argv: list[str]) -> int:
    """Take the run's steps; the exit code."""
    run, flags = load_run(argv, run_parser("benchmarks.measured.bare", "The arithmetic of a run alone."))
    quiet_libraries(verbose=False)
    plan = plan_run(run, run_file=flags.run)
    policy, reference = build_policy_and_reference(plan)
    assert isinstance(reference, SeparateReference)
    windows = list(plan.training_windows(device(), 0))
    merged = [passes(window, reference.score_tokens) for window in windows]
    recorder = Recorder()
    for window, whole in zip(windows, merged, strict=True):
        recorder.loss(step(policy, reference.engine, window, whole, beta=run.loss.beta))
        recorder.step()
    return 0


def passes(window: StepBatches, score_tokens: int) -> list[PreferenceBatch]:
    """What the reference scores in one pass each, equally many on every rank."""
    groups = group_by_tokens(window.batches, score_tokens)
    count = max_over_ranks(len(groups), device())
    return [merge(groups[min(index, len(groups) - 1)]) for index in range(count)]


def step(policy: Any, reference: Any, window: StepBatches, whole: list[PreferenceBatch], *, beta: float) -> float:
    """Forward passes of both, the loss, the backward pass and the update; this rank's part of the loss."""
    total = torch.zeros((), device=device())
    with torch.no_grad():
        margins = torch.cat([margin(reference, batch) for batch in whole])
    sizes = [batch.num_pairs for batch in window.batches]
    for batch, anchor in zip(window.batches, margins[: sum(sizes)].split(sizes), strict=True):
        loss = (-logsigmoid(beta * (margin(policy, batch) - anchor)) * (batch.pair_ids >= 0)).sum() / window.pairs
        policy.backward(loss * world_size(), scale_wrt_gas=False)
        total += loss.detach()
    policy.step()
    return float(total)


def margin(model: Any, batch: PreferenceBatch) -> torch.Tensor:
    """(B,) log-prob of chosen over rejected."""
    chosen, rejected = model(batch=batch).chunk(2)
    return chosen - rejected


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
