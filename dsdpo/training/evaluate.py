"""Held-out metrics: every pair is scored once, then all metrics come from one table of numbers per pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsdpo.data.batch import PreferenceBatch
from dsdpo.distributed import gather_objects
from dsdpo.engine.scoring_mode import scoring
from dsdpo.engine.types import InferenceEngine
from dsdpo.objective.logps import ListLogps, NoLogps, PairLogps
from dsdpo.objective.losses import LossInputs, LossOutput
from dsdpo.objective.scores import PolicyScores, policy_scores
from dsdpo.reference.base import Reference
from dsdpo.training.groups import GROUPED, Grouping
from dsdpo.training.metrics import margins_of_means, pair_metrics, rated_metrics
from dsdpo.training.step_loss import StepLoss

COLUMNS = (
    "pair_id", "chosen", "rejected", "reference_chosen", "reference_rejected", "chosen_tokens", "rejected_tokens",
    "plain_chosen", "likelihood", "entropy_chosen", "entropy_rejected", "margin", "weight", "confidence", "desirable",
)  # fmt: skip
LISTS = ("responses", "reference_responses", "response_tokens", "scores")  # (pairs, n) each, of lists
OPTIONAL = ("likelihood", "margin", "weight", "confidence")  # NaN where a run has none
BINS = 10  # of the calibration error


@dataclass
class HeldOut:
    """What a run knows of its held-out pairs from one evaluation to the next."""

    groupings: Sequence[Grouping] = ()
    first_pair_id: int = 0
    counts: bool = True  # False where another rank of the sequence group counts the same pairs
    reference_is_static: bool = False  # then it is asked once
    anchor: list[list[PairLogps]] = field(default_factory=list)  # its answers, by window


def evaluate(
    policy: InferenceEngine,
    reference: Reference,
    loss: StepLoss,
    windows: Iterable[Sequence[PreferenceBatch]],
    *,
    step: int = 1,
    held_out: HeldOut | None = None,
) -> dict[str, float]:
    """Metrics of the held-out pairs of all ranks as if they were one batch, under the names `eval/...`. Collective.

    Ranks hold equally many batches; filler pairs keep them in step and are not counted. The pairs are put in their own
    order before anything is added up, so that the number of ranks and the batches have no part in the result.
    """
    held_out = held_out or HeldOut()
    rows, without_reference = [], False
    known = list(held_out.anchor)
    with scoring(policy):
        for index, window in enumerate(windows):
            anchor = known[index] if known else reference.score(window)
            if held_out.reference_is_static and not known:
                held_out.anchor.append(list(anchor))
            for batch, reference_logps in zip(window, anchor, strict=True):
                without_reference = isinstance(reference_logps, NoLogps)
                rows.append(table_rows(batch, policy_scores(policy, batch, loss.extras), reference_logps))
    table = gathered(rows, counts=held_out.counts)
    metrics = metrics_of(table, loss, step, without_reference=without_reference)
    for grouping in held_out.groupings:
        of = grouping.of[table["pair_id"].long().numpy() - held_out.first_pair_id]
        whole = not grouping.names[0].startswith(("source/", "length/"))  # a set is all that a data set is
        for place, name in enumerate(grouping.names):
            if (of == place).any():
                part = {column: values[torch.from_numpy(of == place)] for column, values in table.items()}
                found = metrics_of(part, loss, step, without_reference=without_reference)
                names = found if whole else [*GROUPED, "pairs"]
                metrics |= {f"{name}/{key}": found[key] for key in names if key in found}
    return {f"eval/{name}": value for name, value in metrics.items()}


def table_rows(batch: PreferenceBatch, scored: PolicyScores, reference: PairLogps) -> Tensor:
    """(B, columns) float64 of one batch, fillers included, on its device."""
    absent = torch.full_like(scored.chosen, math.nan)
    entropy = (absent, absent) if scored.entropy is None else scored.entropy
    desirable = None if batch.scores is None else batch.scores[:, 0] > 0
    given = (scored.likelihood, batch.margin, batch.weight, batch.confidence, desirable)
    optional = [absent if value is None else value for value in given]
    columns = (
        batch.pair_ids, scored.logps.chosen, scored.logps.rejected, reference.chosen, reference.rejected,
        scored.logps.chosen_tokens, scored.logps.rejected_tokens, scored.chosen, optional[0], *entropy, *optional[1:],
    )  # fmt: skip
    table = torch.stack([column.double() for column in columns], dim=1)
    if not isinstance(scored.logps, ListLogps) or batch.scores is None:
        return table
    assert isinstance(reference, ListLogps)
    wide = (scored.logps.responses, reference.responses, scored.logps.response_tokens, batch.scores)
    return torch.cat([table, *(part.double() for part in wide)], dim=1)


def gathered(rows: Sequence[Tensor], *, counts: bool = True) -> dict[str, Tensor]:
    """The rows of all ranks that count, without fillers, by pair, as float64 columns on the CPU. Collective."""
    own = torch.cat(list(rows)).cpu().numpy() if rows else np.zeros((0, len(COLUMNS)))
    table = np.concatenate(gather_objects(own[(own[:, 0] >= 0) & counts]))
    table = table[np.argsort(table[:, 0], kind="stable")]
    columns = torch.from_numpy(np.ascontiguousarray(table.T))
    found = dict(zip(COLUMNS, columns, strict=False))
    lists = columns[len(COLUMNS) :]
    return found | (dict(zip(LISTS, lists.view(len(LISTS), -1, len(table)).mT, strict=True)) if len(lists) else {})


def metrics_of(
    table: dict[str, Tensor], loss: StepLoss, step: int, *, without_reference: bool = False
) -> dict[str, float]:
    """The metrics of the pairs of a table as one batch, without prefix; `pairs` says how many there are."""
    tokens = table["chosen_tokens"].long(), table["rejected_tokens"].long()
    policy = PairLogps(table["chosen"], table["rejected"], *tokens)
    kind = NoLogps if without_reference else PairLogps
    reference = kind(table["reference_chosen"], table["reference_rejected"], *tokens)
    if "responses" in table:
        sizes = table["response_tokens"].long()
        policy = ListLogps(policy.chosen, policy.rejected, *tokens, table["responses"], sizes)
        reference = ListLogps(reference.chosen, reference.rejected, *tokens, table["reference_responses"], sizes)
    output = loss.function(policy, reference, _inputs(table, loss.held_out(step)))
    if output.desirable is not None:
        return rated_metrics_of(table, output, policy, reference)
    pairs = pair_metrics(output, policy, reference)
    metrics = {name: float(values.double().mean()) for name, values in pairs.items()}
    nll = float(-table["plain_chosen"].sum() / tokens[0].sum())
    metrics |= {"nll/chosen": nll, "perplexity/chosen": math.exp(min(nll, 700.0))}
    wins = pairs["rewards/accuracies"].double()
    for name, those in (("longer", tokens[0] > tokens[1]), ("shorter", tokens[0] < tokens[1])):
        if those.any():
            metrics[f"rewards/accuracies_chosen_{name}"] = float(wins[those].mean())
    margins = pairs["rewards/margins"]
    metrics["rewards/calibration_error"] = calibration_error(margins)
    correlation = correlated(margins, (tokens[0] - tokens[1]).double())
    metrics |= {} if correlation is None else {"rewards/length_correlation": correlation}
    entropy = (table["entropy_chosen"] * tokens[0] + table["entropy_rejected"] * tokens[1]).sum()
    if entropy.isfinite():
        metrics["entropy"] = float(entropy / (tokens[0] + tokens[1]).sum())
    return metrics | {"pairs": float(len(wins))}


def rated_metrics_of(
    table: dict[str, Tensor], output: LossOutput, policy: PairLogps, reference: PairLogps
) -> dict[str, float]:
    """The same of rated completions; `desirable` says how many of them are."""
    every = torch.ones_like(policy.chosen)
    metrics: dict[str, float] = {}
    for values, weight in rated_metrics(output, policy, reference, every):
        if (weight > 0).any():
            metrics |= {name: float(column.double()[weight > 0].mean()) for name, column in values.items()}
    metrics |= margins_of_means(metrics)
    desirable = table["desirable"] > 0
    if desirable.any():
        nll = float(-table["plain_chosen"][desirable].sum() / policy.chosen_tokens[desirable].sum())
        metrics |= {"nll/chosen": nll, "perplexity/chosen": math.exp(min(nll, 700.0))}
    entropy = (table["entropy_chosen"] * policy.chosen_tokens).sum()
    if entropy.isfinite():
        metrics["entropy"] = float(entropy / policy.chosen_tokens.sum())
    return metrics | {"pairs": float(len(every)), "desirable": float(desirable.sum())}


def _inputs(table: dict[str, Tensor], shared: LossInputs) -> LossInputs:
    """What the loss is given of a table's pairs."""
    columns: dict[str, Any] = {name: table[name] for name in OPTIONAL if not table[name].isnan().any()}
    if not table["desirable"].isnan().any():
        columns["desirable"] = table["desirable"] > 0
    return replace(shared, chosen=table["plain_chosen"], scores=table.get("scores"), **columns)


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) of the preference that rewards imply.

    σ(|margin|) is how sure the policy is of its preferred response; it should be right that often. A tie is half right.
    """
    if not margins.isfinite().all():
        return math.nan
    sure = torch.sigmoid(margins.abs())
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    place = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, (right - sure).double())
    return float(gaps.abs().sum() / len(margins))


def correlated(left: Tensor, right: Tensor) -> float | None:
    """Pearson's correlation; None where either does not vary."""
    left, right = left - left.mean(), right - right.mean()
    scale = float(left.norm() * right.norm())
    return float(left @ right) / scale if scale > 0.0 and math.isfinite(scale) else None
