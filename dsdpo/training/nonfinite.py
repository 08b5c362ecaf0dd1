"""Steps that cannot be taken, because a loss or a gradient is not finite: found before anything has changed.

`marked` gives a loss that is not finite a gradient of NaN. DeepSpeed takes no step on a gradient whose norm is not
finite (0.19, at stages 1 to 3 in every precision; `engine/deepspeed_keys.py` refuses what would switch that off), and
all ranks learn it from the sum over ranks that makes the norm. So the check costs no collective and no wait.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsdpo.config.run import RunConfig
from dsdpo.console import counted
from dsdpo.data.steps import StepBatches
from dsdpo.distributed import all_or_none, gather_objects, rank
from dsdpo.errors import TrainingError
from dsdpo.objective.logps import ListLogps, PairLogps
from dsdpo.objective.losses import LossOutput
from dsdpo.run_folder import RunFolder

log = logging.getLogger(__name__)


def marked(loss: Tensor, output: LossOutput, weight: Tensor) -> Tensor:
    """`loss` () with a gradient of NaN where a loss or reward (B,) of a pair that counts is not finite; no wait.

    A loss may be infinite with a finite gradient, and a reference of minus infinity leaves the loss at 0.
    """
    values = torch.stack([output.losses.detach(), output.chosen_rewards, output.rejected_rewards])
    sound = (torch.isfinite(values) | (weight == 0)).all()
    return loss * torch.where(sound, 1.0, math.nan)


def without_fillers(reference: PairLogps, policy: PairLogps, weight: Tensor) -> PairLogps:
    """`reference` with the policy's values, as numbers, for pairs of `weight` (B,) 0; no wait.

    What a look-up answers for a filler may not be finite, and 0 times a gradient of NaN is NaN.
    """
    counts = weight > 0
    more = {}
    if isinstance(reference, ListLogps) and isinstance(policy, ListLogps):
        more["responses"] = torch.where(counts[:, None], reference.responses, policy.responses.detach())
    return replace(
        reference,
        **more,
        chosen=torch.where(counts, reference.chosen, policy.chosen.detach()),
        rejected=torch.where(counts, reference.rejected, policy.rejected.detach()),
    )


class NonfiniteSteps:
    """Steps that were not taken: each one in nonfinite.jsonl, and the end of the run where it asks for that."""

    def __init__(self, run: RunConfig, folder: RunFolder) -> None:
        self._rule, self._limit = run.train.on_nonfinite, run.train.max_skipped_steps
        self._scales_losses = run.model.dtype == "float16"
        self._file = folder.nonfinite
        self._in_a_row = 0

    def note(self, step: int, window: StepBatches, outputs: Sequence[LossOutput], *, taken: bool) -> str | None:
        """Take note of a step, which was `taken` or not; what is wrong with one that is skipped. Collective.

        `outputs` are those of this rank's micro-batches.

        Raises `TrainingError` at the first step that was not taken, or under `on_nonfinite: skip` at the last of
        `max_skipped_steps` in a row. In float16 a step whose losses are all finite is left out by design, to go on
        with a lower loss scale: then there is nothing to note.
        """
        if taken:
            self._in_a_row = 0
            return None
        pairs = nonfinite_pairs(window, outputs)
        if self._scales_losses and not pairs:
            return None
        self._in_a_row += 1
        what = f"the loss of {named(sorted(pairs))}" if pairs else "the gradient, with every loss finite,"
        with all_or_none():
            if rank() == 0:
                self._write(step, window, pairs)
        if self._rule == "stop":
            raise TrainingError(
                f"step {step}: {what} is not finite. No weight was changed, earlier checkpoints are intact, and "
                f"{self._file} has the step's pairs. Mend or remove the pairs, lower optimizer.learning_rate, or go "
                "on with --resume auto --train.on_nonfinite skip, which leaves such steps out"
            )
        if self._in_a_row >= self._limit:
            raise TrainingError(
                f"step {step}: {what} is not finite, for which {counted(self._in_a_row, 'step')} in a row had to be "
                f"left out (train.max_skipped_steps {self._limit}): the run has diverged or its data is broken. "
                f"Earlier checkpoints are intact, and {self._file} has the pairs. Lower optimizer.learning_rate or "
                "mend the data, and start again, or go on from an earlier checkpoint"
            )
        if rank() == 0:
            log.warning("step %d is skipped: %s is not finite; see %s", step, what, self._file)
        return f"step {step}: {what} is not finite"

    def _write(self, step: int, window: StepBatches, pairs: dict[int, dict[str, float]]) -> None:
        row = {
            "step": step,
            "action": self._rule,
            "found": "loss" if pairs else "gradient",
            # As text: JSON has no NaN.
            "losses": {pair: {name: str(value) for name, value in row.items()} for pair, row in pairs.items()},
            "pair_ids": window.pair_ids.tolist(),
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def nonfinite_pairs(window: StepBatches, outputs: Sequence[LossOutput]) -> dict[int, dict[str, float]]:
    """By pair id, loss and rewards of the pairs of all ranks of which one is not finite. Collective."""
    found = {}
    for batch, output in zip(window.batches, outputs, strict=True):
        values = torch.stack([output.losses.detach(), output.chosen_rewards, output.rejected_rewards]).T.tolist()
        for pair_id, (loss, chosen, rejected) in zip(batch.pair_ids.tolist(), values, strict=True):
            if pair_id >= 0 and not all(map(math.isfinite, (loss, chosen, rejected))):
                found[pair_id] = {"loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected}
    return {pair_id: values for part in gather_objects(found) for pair_id, values in part.items()}


def named(pair_ids: Sequence[int]) -> str:
    """The pairs in a few words."""
    shown = ", ".join(map(str, pair_ids[:8]))
    return f"pair {shown}" if len(pair_ids) == 1 else f"pairs {shown}" + (" ..." if len(pair_ids) > 8 else "")
