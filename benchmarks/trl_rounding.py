"""Whose rounding is it where a loss takes exponentials of log-ratios: TRL's or ours?

    python -m benchmarks.trl_rounding REFERENCE ROWS.jsonl --policy LOSS=FOLDER[@STEP,...] ... [--result FILE.json]

The log-ratios of the pairs of some steps (step S trains on rows [8S - 8, 8S) of the file; without steps, of the three
with the largest losses) under the same weights: by TRL's own forward pass in float32, by dsdpo's in packed rows, and by
dsdpo's before its sums become float32, each beside a pass of transformers in float64, one sequence at a time. LOSS is
forward_kl or alpha_divergence, FOLDER what its run of `trl_trajectories` had come to before the step, or in the end.
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
from benchmarks.trl_trajectories import CASES, PAIRS, STEPS

LOSSES = ("forward_kl", "alpha_divergence")
BETA, LARGEST = 0.1, 3  # of the losses; steps
COLUMNS = ("log-probs by", "largest error of a log-ratio, nats", "mean", "largest error of a step's loss")


def pairs_of(rows: Path, steps: list[int], tokenizer: Any) -> list[Any]:
    """The pairs of these steps, tokenized as both sides do."""
    from dsdpo.data.pairs import Group

    lines = rows.read_text().splitlines()
    found: list[Any] = []
    for row in (json.loads(line) for step in steps for line in lines[PAIRS * (step - 1) : PAIRS * step]):
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


def losses(ratios: Tensor, name: str) -> Tensor:
    """A loss of `trl_trajectories` of each step, from log-ratios (2, N) in their own precision."""
    from dsdpo.objective.losses.divergence import derivative

    settings = CASES[name]
    scores = derivative(ratios, settings["f_divergence_type"], settings.get("f_alpha_divergence_coef", 0.5))
    return torch.nn.functional.softplus(-BETA * (scores[0] - scores[1])).view(-1, PAIRS).mean(1)


def largest(policy: Path, reference: Path, rows: Path, tokenizer: Any, name: str) -> list[int]:
    """The steps that have the largest losses with these weights."""
    pairs = pairs_of(rows, list(range(1, STEPS + 1)), tokenizer)
    found = losses(by_dsdpo(policy, pairs) - by_dsdpo(reference, pairs), name)
    return (found.topk(LARGEST).indices + 1).tolist()


def measured(
    name: str, policy: Path, steps: list[int], given: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], Table]:
    """Errors of each way, and their table."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.reference)
    steps = steps or largest(policy, given.reference, given.rows, tokenizer, name)
    pairs = pairs_of(given.rows, steps, tokenizer)
    ways: dict[str, Callable[..., Tensor]] = {
        "TRL, float32": by_trl,
        "dsdpo, float32": by_dsdpo,
        "dsdpo, sums left in float64": lambda path, pairs: by_dsdpo(path, pairs, rounded=False),
    }
    exact = in_float64(policy, pairs) - in_float64(given.reference, pairs)
    found = {}
    for way, ask in ways.items():
        ratios = ask(policy, pairs) - ask(given.reference, pairs)
        errors = (ratios - exact).abs()
        relative = ((losses(ratios, name) - losses(exact, name)) / losses(exact, name)).abs()
        found[way] = {"largest": float(errors.max()), "mean": float(errors.mean()), "loss": float(relative.max())}
        print(name, way, ", ".join(f"{key} {value:.1e}" for key, value in found[way].items()), sep=": ", flush=True)
    rows = tuple((way, *(f"{values[key]:.1e}" for key in ("largest", "mean", "loss"))) for way, values in found.items())
    ends = [f"{float(end):.1f}" for end in exact.aminmax()]
    worst = [f"{float(end):.2f}" for end in losses(exact, name).aminmax()]
    note = (
        f"{len(pairs)} pairs of step {', '.join(map(str, steps))} of trl_trajectories; log-ratios of "
        f"{' to '.join(ends)} nats, losses of {' to '.join(dict.fromkeys(worst))}. Errors are those against "
        "transformers in float64; the loss's are relative."
    )
    when = f"before step {steps[0]}" if len(steps) == 1 else "in the end"
    title = f"{name}: float32 beside float64 on the weights {when}"
    return found, Table(title, COLUMNS, rows, note)


def named_policy(text: str) -> tuple[str, Path, list[int]]:
    """LOSS=FOLDER[@STEP,...] of the command line."""
    name, _, rest = text.partition("=")
    folder, _, steps = rest.partition("@")
    if name not in LOSSES or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: give LOSS=FOLDER[@STEP,...], with a loss of {', '.join(LOSSES)}")
    return name, Path(folder), [int(step) for step in steps.split(",") if step]


@torch.no_grad()
def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--policy", nargs="+", type=named_policy, required=True, metavar="LOSS=FOLDER[@STEP,...]")
    parser.add_argument("--result", type=Path, help="file for the result, e.g. in results/")
    given = parser.parse_args()
    found = [measured(name, policy, steps, given) for name, policy, steps in given.policy]
    if given.result is None:
        return
    report = Report("trl_rounding", "Whose rounding", argparse.Namespace(out=given.result))
    for errors, table in found:
        report.table(table)
        report.measured(table.title, errors)
    report.write()


if __name__ == "__main__":
    main()
