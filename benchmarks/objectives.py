"""What objectives and evaluation cost beside plain DPO, and what a list gains by computing its prompt once.

On two ranks under ZeRO-3 with a separate reference:

- *whole step*: `aot`, which must know the policy's log-probs of the whole step before the first backward pass;
- *everything*: a mix of three losses, metrics by source and length, and samples of 8 prompts once a turn;
- *samples*: the two ways of gathering weights for them, with samples after every step;
- *lists*: 4 completions of a prompt, as long as UltraFeedback's, as one list, as a list in the padded layout, as 4 rows
  of one completion, and as all 6 pairs.

    python -m benchmarks.objectives [--only PART ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.compare import raw, speedups
from benchmarks.harness.inputs import mixed_lengths, random_rows, write_rows
from benchmarks.harness.processes import Measured, Side, measure_memory, run_sides
from benchmarks.harness.sides import Task, ours
from benchmarks.strategies import WARMUP, add_run_options, make_task, run_sections

PARTS = ("whole step", "everything", "samples", "lists")
COMPLETIONS = 4
PROMPT, RESPONSE = 120, 290  # median tokens of UltraFeedback's prompts and completions
MIX = {"type": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]}
COLUMNS = ("run", "s per step", "CPU time, times the first's", "wall clock, times the first's")
Sections = dict[str, Any]


def main() -> None:
    """Measure and report."""
    options = parser("objectives", "Costs of objectives and evaluation; gain of lists.")
    add_run_options(options, memory=False)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    options.add_argument("--ranks", type=int, default=2)
    given = options.parse_args()
    report = Report("objectives", "Objectives, evaluation and lists", given)
    with work_folder(given.folder) as folder:
        task = replace(make_task(given, folder), ranks=given.ranks)
        prompts = write_prompts(task.data, folder / "prompts.jsonl")
        for part in given.only:
            own = replace(task, folder=folder / part.replace(" ", "-"))
            own.folder.mkdir()
            measure(part, own, prompts, given, report)
    report.write()


def measure(part: str, task: Task, prompts: Path, given: argparse.Namespace, report: Report) -> None:
    """Run the sides of a part in turns, and report them."""
    common = run_sections(given)
    if part == "lists":
        sides = list_sides(task, given)
    else:
        sections = {"whole step": whole_step, "everything": everything, "samples": samples}[part](task, prompts, given)
        sides = [ours(name, task, **joined(common, own)) for name, own in sections.items()]
    measured = run_sides(sides, rounds=given.rounds, steps=given.steps, warmup=WARMUP)
    memory = measure_memory(sides, steps=given.steps, warmup=WARMUP) if part == "samples" else None
    report.measured(part, raw(measured, memory))
    columns: tuple[str, ...] = COLUMNS
    rows = [row(name, measured, sides[0].name, given.steps) for name in measured]
    if memory is not None:
        columns = (*columns, "s for samples", "step MiB per rank")
        rows = [(*cells, *sample_cells(measured[cells[0]], memory[cells[0]])) for cells in rows]
    report.table(Table(f"{part}: {task.ranks} ranks, ZeRO-3", columns, tuple(rows), NOTES[part].format(**vars(given))))


def whole_step(task: Task, prompts: Path, given: argparse.Namespace) -> dict[str, Sections]:
    return {"sigmoid": {}, "aot, with a pass ahead": {"loss": {"type": "aot"}}}


def everything(task: Task, prompts: Path, given: argparse.Namespace) -> dict[str, Sections]:
    lines = task.data.read_text().splitlines(keepends=True)
    halves = [task.folder / f"half{index}.jsonl" for index in (0, 1)]
    for path, part in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        path.write_text("".join(part))
    plain = {"evaluation": {"length_buckets": []}, "tracking": {"hints": False}}
    asked = {"prompts": str(prompts), "every_steps": given.steps, "max_new_tokens": 32}
    mixed = {"loss": MIX, "evaluation": {"length_buckets": [64, 128, 256], "samples": asked}}
    return {
        "plain": plain,
        "mix, metrics by source and length": {
            "data": {"train": [str(path) for path in halves]},
            **mixed,
            "evaluation": {"length_buckets": [64, 128, 256]},
        },
        "the same and samples": {"data": {"train": [str(path) for path in halves]}, **mixed},
    }


def samples(task: Task, prompts: Path, given: argparse.Namespace) -> dict[str, Sections]:
    asked = {"prompts": str(prompts), "every_steps": 1, "max_new_tokens": 32}
    return {
        "no samples": {},
        **{f"gather: {way}": {"evaluation": {"samples": {**asked, "gather": way}}} for way in ("whole", "layers")},
    }


def list_sides(task: Task, given: argparse.Namespace) -> list[Side]:
    """The same completions in four ways; a step holds as many prompts in each."""
    prompts = max(1, given.pairs_per_step // COMPLETIONS)
    count = prompts * task.max_steps
    lengths = (8, 6) if given.tiny else (PROMPT, RESPONSE)
    lists = list(list_rows(count, given, lengths))
    files = {
        "lists": write_rows(task.folder / "lists.jsonl", lists),
        "rated": write_rows(task.folder / "rated.jsonl", (row for each in lists for row in rated(each))),
    }
    budget = {"tokens_per_micro_batch": given.micro_batch_tokens}
    length = {"max_length": 2048, "shuffle": False}

    def side(name: str, rows: str, groups: int, loss: str, **data: Any) -> Side:
        own = replace(task, data=files[rows], pairs_per_step=prompts * groups)
        return ours(name, own, batch=budget, loss={"type": loss}, data={**length, **data})

    return [
        side("one list, its prompt once", "lists", 1, "all_pairs", pairing="list"),
        side("one list, padded rows", "lists", 1, "all_pairs", pairing="list", layout="padded"),
        side("4 rows of one completion, packed", "rated", COMPLETIONS, "apo_zero_unpaired"),
        side("all 6 pairs, packed", "lists", 6, "sigmoid", pairing="all"),
    ]


def list_rows(count: int, given: argparse.Namespace, lengths: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Lists of random words: a prompt and `COMPLETIONS` completions with scores."""
    prompt, response = lengths
    drawn = mixed_lengths(2 * count, prompt=prompt, response=response, longest=2000)
    rows = list(random_rows(drawn, 64 if given.tiny else 4096))
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        texts = [row[name] for row in (first, second) for name in ("chosen", "rejected")]
        yield {"prompt": first["prompt"], "completions": texts, "scores": list(range(len(texts), 0, -1))}


def rated(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The completions of a list, each a row of its own."""
    for place, text in enumerate(row["completions"]):
        yield {"prompt": row["prompt"], "completion": text, "label": place < COMPLETIONS // 2}


def write_prompts(data: Path, path: Path) -> Path:
    """The prompts of the first rows."""
    rows = [json.loads(line) for line in data.read_text().splitlines()[:8]]
    return write_rows(path, ({"prompt": row["prompt"]} for row in rows))


def joined(first: Sections, second: Sections) -> Sections:
    """Two groups of sections, section by section."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}


def row(name: str, measured: dict[str, Measured], base: str, steps: int) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    one, first = measured[name], measured[base]
    ratios = [Spread.of(speedups(one, first, clock)).text(unit="x") for clock in ("cpu_s", "wall_s")]
    return (name, f"{statistics.median(turn['wall_s'] for turn in one.turns) / steps:.2f}", *ratios)


def sample_cells(timed: Measured, sized: Measured) -> Sequence[str]:
    """Seconds that samples took each time, and memory of a step."""
    seconds = timed.notes.get("time/samples_s", [])
    return (f"{statistics.median(seconds):.2f}" if seconds else "-", f"{sized.memory['step_mib']:.0f}")


NOTES = {
    "whole step": "{micro_batch_tokens} tokens a micro-batch; a pass goes ahead where a rank has several in a step.",
    "everything": "Samples once in {steps} steps: 8 prompts, 32 tokens each, of policy and, the first time, reference.",
    "samples": "Samples after every step: 8 prompts, 32 tokens each, of the policy. Memory is of runs of its own.",
    "lists": "Medians of 120 tokens a prompt and 290 a completion, lognormal with sigma 0.5; as many prompts a step in "
    "each row. The losses are all_pairs, all_pairs, apo_zero_unpaired, and sigmoid on pairs.",
}


if __name__ == "__main__":
    main()
