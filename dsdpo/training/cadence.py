"""After which steps a run logs, evaluates and saves."""

from __future__ import annotations

from dataclasses import dataclass

from dsdpo.config.run import RunConfig


@dataclass(frozen=True)
class Cadence:
    """After which steps something happens; step 0 is the start."""

    total_steps: int
    log_every: int
    evaluate_every: int  # 0: only at the end
    evaluate_at_start: bool
    checkpoint_every: int  # 0: never

    @classmethod
    def of(cls, run: RunConfig, total_steps: int) -> Cadence:
        """As the run says."""
        return cls(
            total_steps=total_steps,
            log_every=run.tracking.every_steps,
            evaluate_every=run.evaluation.every_steps,
            evaluate_at_start=run.evaluation.at_start,
            checkpoint_every=run.checkpoint.every_steps,
        )

    def log(self, step: int) -> bool:
        return step == 1 or step % self.log_every == 0 or step == self.total_steps

    def evaluate(self, step: int) -> bool:
        if step == 0:
            return self.evaluate_at_start
        return step == self.total_steps or bool(self.evaluate_every and step % self.evaluate_every == 0)

    def checkpoint(self, step: int) -> bool:
        return bool(self.checkpoint_every) and (step % self.checkpoint_every == 0 or step == self.total_steps)
