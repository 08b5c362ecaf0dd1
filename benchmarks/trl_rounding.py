"""Whose rounding is it where a loss takes exponentials of log-ratios: TRL's or ours?

    python -m benchmarks.trl_rounding POLICY REFERENCE ROWS.jsonl [--step S ...] [--result FILE.json]

The log-ratios of the pairs of some steps (rows [8S, 8S + 8) of the file) under the same weights: by TRL's own forward
pass in float32, by dsdpo's in packed rows, and by dsdpo's before its sums become float32, each beside a pass of
transformers in float64, one sequence at a time. POLICY is what a run of `trl_trajectories` with forward_kl exported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.common import Report, Table

PAIRS = 8
COLUMNS = ("log-probs by", "largest error of a log-ratio, nats", "mean", "largest error of a step's forward_kl loss")


def pairs_of(rows: Path, steps: list[int], tokenizer: Any) -> list[Any]:
    """The pairs of these steps, tokenized as both sides do."""
    from dsdpo.data.pairs import Group

    lines = rows.read_text().splitlines()
    found: list[Any] = []
    for row in (json.loads(line) for step in steps for line in lines[PAIRS * step : PAIRS * (step + 1)]):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        both = [
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True, return_dict=False)[len(prompt) :]
            for side in ("chosen", "rejected")
        ]
        found.append(Group.of(len(found), *(np.array(part, dtype=np.int32) for part in (prompt, *both))))
    return found


def load(path: Path, dtype: torch.dtype) -> Any:
    """A model to ask."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def in_float64(path: Path, pairs: list[Any]) -> Tensor:
    """Log-probs (2, N), one sequence at a time."""
    lm, found = load(path, torch.float64), torch.zeros(2, len(pairs), dtype=torch.float64)
    for place, pair in enumerate(pairs):
        for side in (0, 1):
            ids = torch.tensor(np.concatenate([pair.prompt, pair.responses[side]])).long()[None]
            logps = lm(input_ids=ids).logits[0, :-1].log_softmax(-1)[len(pair.prompt) - 1 :]
            found[side, place] = logps.gather(-1, ids[0, len(pair.prompt) :, None]).sum()
    return found


def by_trl(path: Path, pairs: list[Any]) -> Tensor:
    """The same by TRL's forward pass in float32, a step's pairs in one padded batch, summed as its DPOTrainer does."""
    from trl.trainer.utils import add_fused_lm_head

    lm, found = load(path, torch.float32), []
    add_fused_lm_head(lm)
    for start in range(0, len(pairs), PAIRS):
        own = pairs[start : start + PAIRS]
        rows = [(pair.prompt, pair.responses[side]) for side in (0, 1) for pair in own]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, (prompt, response) in enumerate(rows):
            both = torch.tensor(np.concatenate([prompt, response])).long()
            ids[row, : len(both)], mask[row, : len(both)] = both, 1
            labels[row, len(prompt) : len(both)] = both[len(prompt) :]
        answer = lm(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
        found.append(answer.log_probs.sum(1).view(2, -1))
    return torch.cat(found, 1).double()


def by_dsdpo(path: Path, pairs: list[Any], *, rounded: bool = True) -> Tensor:
    """The same by our scorer in float32 on packed rows; the sums as they are, or before they become float32."""
    from dsdpo.data.packed_layout import collate_packed
    from dsdpo.objective.logps import ResponseScorer

    lm, found = load(path, torch.float32), []
    lm.set_attn_implementation("dsdpo")
    scorer = ResponseScorer(lm)
    for start in range(0, len(pairs), PAIRS):
        batch = collate_packed(pairs[start : start + PAIRS])
        if rounded:
            found.append(scorer(batch=batch).view(2, -1).double())
            continue
        sums = torch.zeros(batch.num_responses, dtype=torch.float64)
        tokens = scorer(batch=batch, per_token=True).double()
        found.append(sums.index_add_(0, batch.response, tokens).view(2, -1))
    return torch.cat(found, 1)


def losses(ratios: Tensor) -> Tensor:
    """forward_kl's losses of steps, from log-ratios (2, N)."""
    scores = 1.0 - torch.exp(-ratios)
    return torch.nn.functional.softplus(-0.1 * (scores[0] - scores[1])).view(-1, PAIRS).mean(1)


@torch.no_grad()
def main() -> None:
    """See above."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--step", nargs="+", type=int, default=[22, 14, 9], help="steps whose losses are largest")
    parser.add_argument("--result", type=Path, help="file for the result, e.g. in results/")
    given = parser.parse_args()
    pairs = pairs_of(given.rows, given.step, AutoTokenizer.from_pretrained(given.reference))
    ways: dict[str, Callable[..., Tensor]] = {
        "TRL, float32": by_trl,
        "dsdpo, float32": by_dsdpo,
        "dsdpo, sums left in float64": lambda path, pairs: by_dsdpo(path, pairs, rounded=False),
    }
    exact = in_float64(given.policy, pairs) - in_float64(given.reference, pairs)
    found = {}
    for name, ask in ways.items():
        ratios = ask(given.policy, pairs) - ask(given.reference, pairs)
        errors, relative = (ratios - exact).abs(), ((losses(ratios) - losses(exact)) / losses(exact)).abs()
        found[name] = {"largest": float(errors.max()), "mean": float(errors.mean()), "loss": float(relative.max())}
        print(name, ", ".join(f"{key} {value:.1e}" for key, value in found[name].items()), flush=True)
    if given.result is None:
        return
    report = Report("trl_rounding", "Whose rounding", argparse.Namespace(out=given.result, steps=given.step))
    rows = tuple(
        (name, *(f"{values[key]:.1e}" for key in ("largest", "mean", "loss"))) for name, values in found.items()
    )
    note = (
        f"{len(pairs)} pairs of the steps {', '.join(map(str, given.step))} of trl_trajectories, whose losses have the "
        f"largest exponentials; log-ratios of {float(exact.min()):.1f} to {float(exact.max()):.1f} nats, the same "
        "weights for all. Errors are those against transformers in float64; the loss's are relative."
    )
    report.table(Table("Float32 beside float64 on the same weights", COLUMNS, rows, note))
    report.measured("errors", found)
    report.write()


if __name__ == "__main__":
    main()
