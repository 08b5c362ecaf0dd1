"""What a run's data and metrics suggest to someone who has not seen many runs: each said once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dsdpo.config.loss import LossConfig
from dsdpo.config.shipped import page
from dsdpo.data.pairs import Pairs
from dsdpo.distributed import name_of

PAGE = "hints.md"
ROWS = 10  # of metrics.jsonl that are averaged before anything is said of them
FALLEN = 5.0  # nats that the chosen response's log-ratio is below 0
FAR_MARGIN = 15.0  # of rewards: the loss of such a pair has no gradient left
CHANCE_AFTER, CHANCE = 100, 0.55  # steps, accuracy
LENGTH_GAP = 0.25  # between the accuracies where chosen is the longer and where it is the shorter response
UNLIKELY_NLL = 2.5  # nats a token of the chosen responses, before training
STRAGGLER_SHARE = 0.2  # of a step, that others wait for one rank
TRUNCATED_SHARE, DUPLICATE_SHARE = 0.1, 0.05
COMPARED = 100_000  # pairs that are looked through for contradictions: a second's work
SATURATES = ("sigmoid", "robust", "exo_pair", "apo_zero", "apo_down", "bco_pair", "dpop", "dpo_shift", "odpo")


@dataclass
class Hints:
    """Which hints a run has had, and the latest rows of its metrics."""

    loss: LossConfig
    said: dict[str, float]  # goes into checkpoints, so that a resumed run does not say them again

    def __post_init__(self) -> None:
        self._rows: deque[Mapping[str, float]] = deque(maxlen=ROWS)

    def of_row(self, step: int, row: Mapping[str, float]) -> list[str]:
        """What a row of training metrics, with those before it, suggests for the first time."""
        if "loss" not in row:
            return []
        self._rows.append(row)
        found = [self._unlikely(row)] if step == 1 and "nll/chosen" in row else []
        if len(self._rows) == ROWS and "perf/imbalance_s" in row:
            found.append(_straggler(list(self._rows)))
        if self.loss.rows == "pairs" and len(self._rows) == ROWS:
            mean = {name: float(np.mean([each[name] for each in self._rows if name in each])) for name in row}
            found += [self._fallen(mean), self._far(mean), _at_chance(step, mean), _length_bias(mean)]
        return self._new(step, found)

    def of_data(self, pairs: Pairs) -> list[str]:
        """What the training pairs suggest."""
        contradictory = _contradictions(pairs) if self.loss.rows == "pairs" else None
        return self._new(0, [_truncated(pairs), _duplicates(pairs), contradictory])

    def _new(self, step: int, found: list[tuple[str, str] | None]) -> list[str]:
        lines = []
        for name, text in filter(None, found):
            if f"hint/{name}" not in self.said:
                self.said[f"hint/{name}"] = float(step)
                lines.append(f"hint{f' (step {step})' if step else ''}: {text} See {page(f'{PAGE}#{name}')}")
        return lines

    def _fallen(self, mean: Mapping[str, float]) -> tuple[str, str] | None:
        if self.loss.reference_use == "unused" or {"sft", "dpop", "cal_dpo"} & set(self.loss.types):
            return None
        beta = mean.get("loss/beta", self.loss.beta)
        chosen, rejected = mean["rewards/chosen"] / beta, mean["rewards/rejected"] / beta
        if self.loss.rpo_alpha is not None or not rejected < chosen < -FALLEN:
            return None
        return "chosen-falls", (
            f"rewards/chosen {mean['rewards/chosen']:.2f}: chosen responses have become less likely by {-chosen:.0f} "
            f"nats, beside rejected ones by {-rejected:.0f}. Cures: loss.rpo_alpha 1 (adds their likelihood), "
            "loss.type dpop (forbids the fall), loss.type apo_zero (raises them by itself)."
        )

    def _unlikely(self, row: Mapping[str, float]) -> tuple[str, str] | None:
        """The policy before training, or a reference of other weights, whose log-probs the rewards tell."""
        nll, whose = row["nll/chosen"], "policy"
        if self.loss.reference_use != "unused" and {"rewards/chosen", "logps/chosen", "lengths/chosen"} <= set(row):
            beta = row.get("loss/beta", self.loss.beta)
            theirs = (row["rewards/chosen"] / beta - row["logps/chosen"]) / max(1.0, row["lengths/chosen"])
            nll, whose = max((nll, whose), (theirs, "reference"))
        if nll < UNLIKELY_NLL:
            return None
        return "far-from-data", (
            f"nll/chosen {nll:.2f} nats a token before training: the {whose} finds the chosen responses unlikely. "
            "Fine-tune on them first, or check the chat template."
        )

    def _far(self, mean: Mapping[str, float]) -> tuple[str, str] | None:
        margin = mean["rewards/margins"]
        if margin < FAR_MARGIN or not set(self.loss.types) & set(SATURATES):
            return None
        return "margin-explodes", (
            f"rewards/margins {margin:.1f}: the pairs are told apart completely and the loss has hardly a gradient "
            "left; more steps overfit. Lower optimizer.learning_rate or the epochs, or raise loss.beta."
        )


def _straggler(rows: Sequence[Mapping[str, float]]) -> tuple[str, str] | None:
    ranks = {row["time/slowest_rank"] for row in rows}
    waited, step = (float(np.mean([row[name] for row in rows])) for name in ("perf/imbalance_s", "time/step_s"))
    if len(ranks) > 1 or waited < STRAGGLER_SHARE * step:
        return None
    return "straggler", (
        f"{name_of(int(ranks.pop()))} is the slowest of all in each of {len(rows)} rows, and others wait {waited:.2f} "
        f"of {step:.2f} s a step for it: see what else runs on its node, its clocks, and its data's disk."
    )


def _at_chance(step: int, mean: Mapping[str, float]) -> tuple[str, str] | None:
    accuracy = mean["rewards/accuracies"]
    if step < CHANCE_AFTER or accuracy > CHANCE:
        return None
    return "at-chance", (
        f"rewards/accuracies {accuracy:.2f} after {step} steps: nothing is learned yet. Raise "
        "optimizer.learning_rate, or look whether the labels can be told from the responses."
    )


def _length_bias(mean: Mapping[str, float]) -> tuple[str, str] | None:
    longer, shorter = (mean.get(f"rewards/accuracies_chosen_{name}") for name in ("longer", "shorter"))
    if longer is None or shorter is None or longer - shorter < LENGTH_GAP:
        return None
    return "length-bias", (
        f"rewards/accuracies_chosen_longer {longer:.2f} but _shorter {shorter:.2f}: the policy learns that longer is "
        "better. Try loss.type sigmoid_norm or simpo, or loss.ld_alpha below 1."
    )


def _truncated(pairs: Pairs) -> tuple[str, str] | None:
    share = pairs.report.truncated / max(1, pairs.report.kept)
    if share < TRUNCATED_SHARE:
        return None
    return "truncation", (
        f"{share:.0%} of the training pairs have a response cut to data.max_length, whose ends are never learned: "
        "raise data.max_length if memory allows."
    )


def _duplicates(pairs: Pairs) -> tuple[str, str] | None:
    count, total = sum(source.duplicates for source in pairs.sources), sum(source.pairs for source in pairs.sources)
    if not total or count / total < DUPLICATE_SHARE:
        return None
    return "duplicates", f"{count:,} of {total:,} training pairs stand there more than once, and count as often."


def _contradictions(pairs: Pairs) -> tuple[str, str] | None:
    count = contradictions(pairs)
    if not count:
        return None
    return "contradictions", (
        f"{count:,} training pairs are also there with their labels swapped, so that nothing can be learned of them. "
        "loss.label_smoothing above 0 allows for wrong labels."
    )


def contradictions(pairs: Pairs) -> int:
    """Pairs among the first 100,000 whose two responses stand the other way round in an earlier one."""
    if pairs.group_size != 2:
        return 0
    some = min(len(pairs), COMPARED)
    ends = pairs.starts[:some, None] + np.cumsum(pairs.lengths[:some], axis=1)
    tokens = pairs.tokens.view(np.ndarray)  # slices of a memory map are slow
    seen: set[tuple[int, int, int]] = set()
    count = 0
    for start, *parts in np.column_stack([pairs.starts[:some], ends]).tolist():
        prompt, chosen, rejected = (hash(tokens[a:b].tobytes()) for a, b in pairwise([start, *parts]))
        count += (prompt, rejected, chosen) in seen
        seen.add((prompt, chosen, rejected))
    return count
