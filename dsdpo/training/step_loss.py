"""The loss of a run as training goes: beta by step, and what a loss must know of all pairs of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dsdpo.config.loss import LOSSES, LossConfig
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.steps import StepBatches
from dsdpo.distributed import world_size
from dsdpo.engine.quirks.gather_trace import SecondOrder
from dsdpo.engine.types import TrainingEngine
from dsdpo.objective.logps import PairLogps, token_counts
from dsdpo.objective.losses import LossInputs, LossOutput, StepPairs, make_loss
from dsdpo.objective.router import Routing, pull
from dsdpo.objective.scores import PolicyScores, extras_of, policy_scores
from dsdpo.reference.base import score_batches

MOMENTUM = 0.9  # of beta-DPO's mean margin (Wu et al. 2024, arXiv 2407.08639, eq. 9)
LEAST_BETA = 1e-3  # beta-DPO's; its formula could make it negative


class StepLoss:
    """The function that a run minimizes, and the running means that belong to it.

    `aot`, `aot_unpaired`, `alpha_dpo`, `kto` and beta-DPO must know the policy's log-probs of all pairs of a step
    before the first backward pass. They come from a pass without gradient over the step's pairs, so that the loss is
    that of the step however it is batched; where each rank has one micro-batch, from the training pass itself. So does
    the load-balancing loss of a mixture of experts, which must know how often each expert is chosen in the step. BCO's
    running mean is of earlier steps and costs a sum over ranks of two numbers.
    """

    def __init__(
        self,
        loss: LossConfig,
        *,
        total_steps: int = 1,
        means: dict[str, float] | None = None,
        score_tokens: int = 32768,
        entropy: bool = False,
        routing: Routing | None = None,
    ) -> None:
        """`means` is where the running means are kept, from step to step and in checkpoints.

        `routing`: what is asked of the policy's routers, if it is a mixture of experts.
        """
        self.settings = loss
        self.function = make_loss(loss)
        self.means = {} if means is None else means
        self.extras = extras_of(loss, entropy=entropy)
        kinds = [LOSSES[name] for name in loss.types]
        self.needs_logps = loss.beta_dpo_alpha is not None or any(kind.step_logps for kind in kinds)
        self.routing = routing
        self.balances = routing is not None and routing.coefficient > 0.0
        self.needs_pass = self.needs_logps or self.balances
        self._pull: Tensor | None = None  # of the step's load-balancing loss, see `router.pull`
        self.needs_tokens = any(kind.step_tokens for kind in kinds)
        self._total_steps, self._score_tokens = total_steps, score_tokens
        self._gathers: SecondOrder | None = None

    def beta(self, step: int) -> float:
        """Of optimizer step `step`, counted from 1; under beta-DPO the last one's."""
        return self.means.get("beta", self.settings.beta_at(step, self._total_steps))

    def metrics(self, step: int) -> dict[str, float]:
        """What to record of the loss itself."""
        moves = self.settings.beta_schedule is not None or self.settings.beta_dpo_alpha is not None
        delta = {"loss/bco_delta": self._delta()} if self.settings.bco_running_delta else {}
        return ({"loss/beta": self.beta(step)} if moves else {}) | delta

    def held_out(self, step: int) -> LossInputs:
        """What all held-out pairs share, evaluated as one step."""
        return LossInputs(beta=self.beta(step), bco_delta=self._delta())

    def ahead(
        self,
        policy: TrainingEngine,
        window: StepBatches,
        anchor: Sequence[PairLogps],
        first: PolicyScores | None,
        *,
        step: int,
    ) -> list[LossInputs]:
        """What each batch's loss is given beside its own log-probs. Collective for the losses that ask for the step.

        `first` is the training pass over the only batch, where there is only one.
        """
        whole: list[StepPairs | None] = [None] * len(window.batches)
        logps: list[PairLogps] = []
        if self.needs_pass:
            logps, chosen = self._pass_ahead(policy, window) if first is None else ([first.logps], first.loads)
            self._note_loads(chosen)
        if self.needs_logps:
            whole = list(of_step(window, logps, anchor))
        elif self.needs_tokens:
            whole = list(of_step(window))
        beta = self._beta_of_step(whole[0], step)
        return [
            LossInputs(
                beta=beta,
                step=pairs,
                margin=batch.margin,
                weight=batch.weight,
                confidence=batch.confidence,
                bco_delta=self._delta(),
                desirable=desirable_of(batch) if self.settings.rows == "rated" else None,
                scores=batch.scores if self.settings.rows == "lists" else None,
            )
            for batch, pairs in zip(window.batches, whole, strict=True)
        ]

    def taken(self, window: StepBatches, outputs: Sequence[LossOutput]) -> None:
        """Move the running means on after a step that changed the weights. Collective where there are any."""
        if not self.settings.bco_running_delta:
            return
        total = torch.zeros((), dtype=torch.float64, device=outputs[0].losses.device)
        for batch, output in zip(window.batches, outputs, strict=True):
            both = (output.chosen_rewards + output.rejected_rewards).double()
            total += torch.where(batch.pair_ids >= 0, both, 0.0).sum() * window.counts
        if world_size() > 1:
            dist.all_reduce(total)
        self.means["rewards"] = self.means.get("rewards", 0.0) + float(total)
        self.means["responses"] = self.means.get("responses", 0.0) + 2.0 * window.pairs

    def balance(self, scored: PolicyScores) -> Tensor | float:
        """A micro-batch's part of the step's weighted load-balancing loss, () with gradient; 0 where there is none."""
        if not self.balances:
            return 0.0
        assert scored.loads is not None
        assert self._pull is not None
        return (self._pull * scored.loads[1]).sum()

    def _note_loads(self, loads: Tensor | None) -> None:
        """Take note of how often each expert is chosen in the step, from this rank's batches. Collective."""
        if not self.balances:
            return
        assert self.routing is not None
        assert loads is not None
        chosen = loads[0].detach().clone()
        if world_size() > 1:
            dist.all_reduce(chosen)
        self._pull = pull(chosen, self.routing)

    def _delta(self) -> float:
        """BCO's mean reward of both responses over all earlier steps."""
        return self.means.get("rewards", 0.0) / max(1.0, self.means.get("responses", 0.0))

    def _beta_of_step(self, pairs: StepPairs | None, step: int) -> float:
        """Beta; under beta-DPO as the step's mean margin says: beta · (1 + alpha · (mean − mean of earlier steps))."""
        alpha = self.settings.beta_dpo_alpha
        if alpha is None:
            return self.beta(step)
        assert pairs is not None
        policy, reference = pairs.everything()
        margins = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
        mean, before = self.settings.beta * float(margins.mean()), self.means.get("margin", 0.0)
        self.means["margin"] = MOMENTUM * before + (1.0 - MOMENTUM) * mean
        self.means["beta"] = max(LEAST_BETA, self.settings.beta * (1.0 + alpha * (mean - before)))
        return self.means["beta"]

    def _pass_ahead(self, policy: TrainingEngine, window: StepBatches) -> tuple[list[PairLogps], Tensor | None]:
        """The policy's log-probs of this rank's batches and its routers' loads, without gradient. Collective."""
        loads: list[Tensor] = []

        def ask(model: Callable[..., Tensor], batch: PreferenceBatch) -> PairLogps:
            scored = policy_scores(model, batch, routing=self.routing if self.balances else None)
            loads.extend([] if scored.loads is None else [scored.loads])
            return scored.logps

        self._gathers = self._gathers or SecondOrder(policy)
        policy.eval()
        try:
            with self._gathers.recorded_apart():
                logps = score_batches(policy, window.batches, score_tokens=self._score_tokens, ask=ask)
                return logps, torch.stack(loads).sum(0) if loads else None
        finally:
            policy.train()


def desirable_of(batch: PreferenceBatch) -> Tensor:
    """(B,) bool: which completions are rated desirable."""
    assert batch.scores is not None
    return batch.scores[:, 0] > 0


def given(inputs: LossInputs, scored: PolicyScores) -> LossInputs:
    """The inputs of a batch, with what its own forward pass gave."""
    return replace(inputs, likelihood=scored.likelihood, chosen=scored.chosen)


def of_step(window: StepBatches, logps: Sequence[PairLogps] = (), anchor: Sequence[PairLogps] = ()) -> list[StepPairs]:
    """All pairs of a step as each batch sees them, with the log-probs of policy and reference if given. Collective.

    One sum over ranks of a table with a row for each pair, in which each rank has filled in its own.
    """
    device = window.batches[0].pair_ids.device
    order = np.argsort(window.pair_ids, kind="stable")
    ids = torch.from_numpy(window.pair_ids[order]).to(device)
    places = torch.from_numpy(order).to(device)
    table = torch.zeros(window.pairs, 6, dtype=torch.float64, device=device)
    own = []
    for index, batch in enumerate(window.batches):
        own.append(places[torch.searchsorted(ids, batch.pair_ids).clamp(max=window.pairs - 1)])
        real = (batch.pair_ids >= 0)[:, None] & window.counts
        table.index_add_(0, own[-1], torch.where(real, _row(batch, index, logps, anchor), 0.0))
    if world_size() > 1:
        dist.all_reduce(table)
    tokens = table[:, 4:].long()
    policy, reference = (PairLogps(table[:, i], table[:, i + 1], tokens[:, 0], tokens[:, 1]) for i in (0, 2))
    if logps:
        kept = [_as(policy, logps[0].chosen.dtype), _as(reference, logps[0].chosen.dtype)]
        return [StepPairs(window.pairs, tokens[:, 0].sum(), places, *kept) for places in own]
    return [StepPairs(window.pairs, tokens[:, 0].sum(), places) for places in own]


def _row(batch: PreferenceBatch, index: int, logps: Sequence[PairLogps], anchor: Sequence[PairLogps]) -> Tensor:
    """(B, 6): chosen and rejected under the policy, under the reference, and their tokens."""
    counts = token_counts(batch).view(2, -1)
    nothing = torch.zeros_like(counts[0])
    policy = (logps[index].chosen.detach(), logps[index].rejected.detach()) if logps else (nothing, nothing)
    reference = (anchor[index].chosen, anchor[index].rejected) if logps else (nothing, nothing)
    return torch.stack([*(part.double() for part in (*policy, *reference)), *counts.double()], dim=1)


def _as(logps: PairLogps, dtype: torch.dtype) -> PairLogps:
    return replace(logps, chosen=logps.chosen.to(dtype), rejected=logps.rejected.to(dtype))
