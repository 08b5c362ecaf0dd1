"""Scores of pairs under a policy and a reference: a table with a row for each pair, and what it says in sum."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dsdpo.atomic import replacing
from dsdpo.config.data import SourceConfig
from dsdpo.config.loss import LossConfig
from dsdpo.config.run import ModelConfig
from dsdpo.console import say
from dsdpo.data.condition import SCORES, Condition
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.formats import look_up
from dsdpo.data.sources import find_sources, read_rows
from dsdpo.distributed import gather_objects, on_some_ranks, rank
from dsdpo.engine.build import device
from dsdpo.engine.download import fetch_model
from dsdpo.engine.quirks.compiled_ops import prepare_ops
from dsdpo.engine.quirks.destroy import destroy_engine
from dsdpo.engine.scoring_mode import scoring
from dsdpo.errors import ConfigError, DataError
from dsdpo.objective.logps import ListLogps, NoLogps, PairLogps
from dsdpo.objective.scores import extras_of
from dsdpo.reference.base import build_checked_reference
from dsdpo.reference.precomputed import precompute
from dsdpo.run.judge import Judged, as_precomputed, plan_judging
from dsdpo.run.plan import Plan
from dsdpo.stop_request import StopRequest
from dsdpo.training.step_loss import StepLoss

Table = dict[str, Any]  # column name -> (n,) array, or a list of n lists
SIDES = ("chosen", "rejected")


def score_judged(
    what: Judged,
    sources: Sequence[SourceConfig],
    *,
    run_file: str,
    stop: StopRequest,
    tokens: bool = False,
    by: str | None = None,
) -> tuple[Table, Plan]:
    """Every pair's log-probs, rewards and margin, in the order of the rows, on all ranks alike. Collective.

    Log-probs come from the store of precomputed ones and are kept there. With `tokens`, also the id and log-prob of
    each learned token, on rank 0. `by`: a column that every row must have. Raises `ConfigError` or `DataError` before
    a model loads, `StoppedError` when it is to stop: what has been scored is stored.
    """
    _check_loss(what.run.loss, tokens=tokens)
    if what.reference == what.policy:
        raise ConfigError(
            f"{run_file}: policy and reference are both {what.policy.path}, so that all margins would be 0: name a "
            "trained run, or another --reference"
        )
    plan = plan_judging(what, list(sources), strategy="precomputed", run_file=run_file)
    if by is not None:
        on_some_ranks(rank() == 0, lambda: values_of(sources, plan, by))
    prepare_ops(plan.policy_config, plan.reference_config)
    policy = _scored(plan, what.policy, stop, "policy")
    pairs = len(plan.train.pairs)
    reference: PairLogps = NoLogps.zeros(pairs)  # of lists no loss does without one
    if what.reference is not None:
        reference = _scored(plan, what.reference, stop, "reference")
    table = make_table(plan, policy, reference, what.loss(plan.run), step=what.loss_step)
    if tokens:
        table |= token_columns(plan, what.policy, "")
        table |= {} if what.reference is None else token_columns(plan, what.reference, "reference_")
    return table, plan


def _scored(plan: Plan, model: ModelConfig, stop: StopRequest, whose: str) -> PairLogps:
    fetch_model(model)
    return precompute(as_precomputed(plan, model), stop, whose=whose, data="given").table.to("cpu")


def _check_loss(loss: LossConfig, *, tokens: bool) -> None:
    """Raise `ConfigError` where a loss needs more of the policy than a sum of log-probs, which is what is stored."""
    if extras_of(loss):
        named = [name for name in ("use_weighting", "ld_alpha", "decay") if getattr(loss, name) not in (None, False)]
        raise ConfigError(
            f"dsdpo score goes by the sums of responses' log-probs, and loss.{' and loss.'.join(named)} with loss.type "
            f"{' + '.join(loss.types)} asks for more: add --loss.{named[0]} "
            f"{'false' if named[0] == 'use_weighting' else 'null'}, or use dsdpo evaluate"
        )
    if tokens and loss.rows != "pairs":
        raise ConfigError(
            f"--tokens: gives the tokens of chosen and rejected, and rows of loss.type {' + '.join(loss.types)} have "
            "none: leave it out"
        )


def make_table(plan: Plan, policy: PairLogps, reference: PairLogps, loss: StepLoss, *, step: int) -> Table:
    """The columns of SCORES; loss and rewards are the run's loss's, and a pair is right if its margin is above 0.

    A rated completion stands under chosen, and its margin is how far its reward lies on its rating's side of the KL
    estimate over all of them. Of a list chosen is the best completion and rejected the last; `logps`, `reference_logps`
    and `completion_tokens` have a number for each.
    """
    pairs = plan.train.pairs
    columns: dict[str, Any] = {"chosen": policy.chosen}
    given = {"margin": pairs.margins, "weight": pairs.weights, "confidence": pairs.confidences, "scores": pairs.scores}
    for name, values in given.items():
        columns[name] = None if values is None else torch.from_numpy(np.array(values))
    if loss.settings.rows == "rated":
        columns["desirable"] = columns["scores"][:, 0] > 0
    output = loss.function(policy, reference, replace(loss.held_out(step), **columns))
    names = [source.path for source in pairs.sources]
    ours, theirs = policy.numpy(), reference.numpy()
    rewards = [values.detach().float().numpy() for values in (output.chosen_rewards, output.rejected_rewards)]
    margins = rewards[0] - rewards[1]
    absent = np.full(len(pairs), np.nan, dtype=np.float32)
    anchored = not isinstance(reference, NoLogps)
    if output.desirable is not None:
        assert output.kl is not None
        ours |= {"rejected": absent, "rejected_tokens": np.zeros_like(ours["rejected_tokens"])}
        theirs |= {"rejected": absent}
        side = np.where(output.desirable.numpy(), 1.0, -1.0).astype(np.float32)
        rewards[1] = absent
        margins = (rewards[0] - loss.beta(step) * float(output.kl)) * side
    lists: Table = {}
    if isinstance(policy, ListLogps):
        lists = {"logps": ours["responses"].tolist(), "reference_logps": theirs["responses"].tolist(),
                 "completion_tokens": ours["response_tokens"].tolist()}  # fmt: skip
    table = dict(
        zip(
            SCORES,
            (
                np.array(names, dtype=object)[pairs.origins[:, 0]],
                np.array(pairs.origins[:, 1]),
                np.array(pairs.lengths[:, 0]),
                ours["chosen_tokens"],
                ours["rejected_tokens"],
                ours["chosen"],
                ours["rejected"],
                theirs["chosen"] if anchored else absent,
                theirs["rejected"] if anchored else absent,
                *rewards,
                margins,
                margins > 0,
                output.losses.detach().float().numpy(),
            ),
            strict=True,
        )
    )
    return table | lists


def token_columns(plan: Plan, model: ModelConfig, prefix: str) -> Table:
    """Log-prob of every learned token of both responses, and without a prefix its id; empty but on rank 0. Collective.

    A pass of its own over all pairs: they are not stored.
    """
    engine, _ = build_checked_reference(as_precomputed(plan, model))
    found: dict[int, list[np.ndarray]] = {}
    answers: Any = engine
    with scoring(engine):
        for window in plan.train.whole_pass():
            for batch in (each.to(device()) for each in window):
                logps = answers(batch=batch, per_token=True).float().cpu().numpy()
                ids, of = batch.targets.cpu().numpy(), batch.response.cpu().numpy()
                rows = {}
                for place, pair in enumerate(batch.pair_ids.tolist()):
                    if pair >= 0:
                        own = [of == place, of == batch.num_pairs + place]
                        rows[pair] = [part[mask] for part in (logps, ids) for mask in own]
                for part in gather_objects(rows):
                    found |= part if rank() == 0 else {}
    destroy_engine(engine)
    if rank() != 0:
        return {}
    columns = {f"{prefix}{side}_token_logps": [found[i][k].tolist() for i in range(len(plan.train.pairs))]
               for k, side in enumerate(SIDES)}  # fmt: skip
    if not prefix:
        columns |= {f"{side}_token_ids": [found[i][2 + k].tolist() for i in range(len(plan.train.pairs))]
                    for k, side in enumerate(SIDES)}  # fmt: skip
    return columns


def write_table(table: Table, path: Path, kept: np.ndarray, *, facts: dict[str, Any]) -> None:
    """Write the rows that are `kept` (n,) as Parquet, with `facts` in its metadata. Raises `ConfigError`."""
    places = np.flatnonzero(kept)
    content = pa.table({name: _column(values, places) for name, values in table.items()})
    content = content.replace_schema_metadata({"dsdpo": json.dumps(facts)})
    try:
        with replacing(path) as file:
            pq.write_table(content, file)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error}") from error


def _column(values: Any, places: np.ndarray) -> Any:
    return [values[place] for place in places] if isinstance(values, list) else pa.array(values[places])


def summary(table: Table, kept: np.ndarray | None = None) -> str:
    """What the scores say in sum, in a few lines."""
    margins, right = table["margin"], table["right"]
    low, middle, high = np.percentile(margins, [5, 50, 95])
    lines = [
        f"{len(right):,} pairs, {right.mean():.1%} right, {(margins == 0).mean():.1%} tied",
        f"margin: mean {margins.mean():.4f}, 5% below {low:.4f}, half below {middle:.4f}, 5% above {high:.4f}",
        f"rewards: {', '.join(_means(table))}",
    ]
    if kept is not None:
        lines.append(f"kept {kept.sum():,} of {len(kept):,}")
    return "\n".join(lines)


def _means(table: Table) -> list[str]:
    sides = {side: table[f"{side}_reward"] for side in SIDES}
    return [f"{side} {values.mean():.4f}" for side, values in sides.items() if not np.isnan(values).all()]


def original_rows(sources: Sequence[SourceConfig], plan: Plan) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Source, number and content of every row of the pairs' files, as it stands there."""
    for index, source in enumerate(find_sources(sources, "train", plan.run.data)):
        for number, (_, row) in enumerate(read_rows(source)):
            if isinstance(row, dict):
                yield index, number, row


def write_rows(sources: Sequence[SourceConfig], plan: Plan, kept: np.ndarray, path: Path) -> int:
    """Write the original rows of the pairs that are kept as JSON Lines, each once; how many. Raises `ConfigError`."""
    wanted = {(int(source), int(row)) for source, row in plan.train.pairs.origins[kept]}
    count = 0
    try:
        with replacing(path) as file:
            for source, number, row in original_rows(sources, plan):
                if (source, number) in wanted:
                    file.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode())
                    count += 1
    except OSError as error:
        raise ConfigError(f"--rows: {path} cannot be written: {error}") from error
    return count


def values_of(sources: Sequence[SourceConfig], plan: Plan, column: str) -> np.ndarray:
    """(n,) text: what each pair's row has in a column of its own file. Raises `DataError` where a row has none."""
    found = {}
    for source, number, row in original_rows(sources, plan):
        value = look_up(row, column)
        if value is not None and not isinstance(value, BadRow):
            found[source, number] = str(value)
    try:
        return np.array([found[int(s), int(r)] for s, r in plan.train.pairs.origins], dtype=object)
    except KeyError as error:
        source, row = error.args[0]
        raise DataError(f"--by: row {row} of {sources[source].path} has no {column}") from None


def keep_rows(table: Table, condition: Condition | None) -> np.ndarray:
    """(n,) bool: the pairs that a condition on the columns keeps, all without one."""
    arrays = {name: values for name, values in table.items() if not isinstance(values, list)}
    return np.ones(len(table["row"]), dtype=bool) if condition is None else condition.holds(arrays)


def say_groups(table: Table, groups: np.ndarray) -> dict[str, float]:
    """Say the share of right pairs by group; the shares. A tie counts as half, as guessing would."""
    wins = table["right"] + 0.5 * (table["margin"] == 0)
    shares = {}
    for name in sorted(set(groups)):
        those = groups == name
        shares[name] = float(wins[those].mean())
        say(f"  {name:<28}{shares[name]:>8.1%}{int(those.sum()):>8,} pairs")
    return shares
