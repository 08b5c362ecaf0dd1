"""How many token positions ranks in step compute per token that is of use: no model, nothing but plans of lengths.

Under ZeRO-3 ranks wait for each other in every layer, so a step costs the sum over its micro-batches of the costliest
rank's. Of use is each prompt once and both responses.

    python -m benchmarks.packing [--measure]
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.compare import raw, speedups
from benchmarks.harness.inputs import SMALL, make_model, mixed_lengths, random_rows, write_rows
from benchmarks.harness.processes import run_sides
from benchmarks.harness.sides import Task, available_ranks, default_dtype, ours
from dsdpo.data.binning import MicroBatchBudget
from dsdpo.data.plan import MicroBatches, plan_step, step_cost

# Median prompt and response tokens, and the lognormal sigma, of the mixes.
MIXES = {
    "prompt-heavy": (768, 128, 0.5),
    "balanced": (256, 256, 0.5),
    "response-heavy": (128, 384, 0.7),
    "long tail": (192, 192, 0.9),
}
LONGEST = 4096
PADDED, SORTED, OURS = "padded micro-batches of 4, random order", "padded, sorted in the step", "ours"
CLOCKS = ("cpu_s", "wall_s")


def main() -> None:
    """Count, measure if asked to, and report."""
    options = parser("packing", "Token positions computed per useful token.", steps=20)
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 64])
    options.add_argument("--pairs-per-rank", type=int, default=16, help="in one optimizer step")
    options.add_argument("--micro-batch-tokens", type=int, default=8192, help="batch.tokens_per_micro_batch")
    options.add_argument("--measure", action="store_true", help="train on two ranks too, on lengths a quarter as long")
    given = options.parse_args()
    report = Report("packing", "Token positions computed per useful token", given)
    rows = [simulated(report, given, ranks, name) for ranks in given.ranks for name in MIXES]
    columns = (
        "ranks",
        "mix (median prompt + response)",
        PADDED,
        SORTED,
        f"{OURS}: packed, at most {given.micro_batch_tokens} tokens",
        f"{OURS} against {PADDED}",
    )
    note = (
        f"Simulated with lognormal lengths, {given.rounds} seeds: median [lowest, highest]. 1.00 would be every rank "
        "computing useful tokens all the time."
    )
    title = f"Plans of {given.pairs_per_rank} pairs per rank and step, {given.steps} steps"
    report.table(Table(title, columns, tuple(rows), note))
    if given.measure:
        measure(report, given)
    report.write()


def simulated(report: Report, given: argparse.Namespace, ranks: int, name: str) -> tuple[str, ...]:
    """One mix on so many ranks."""
    prompt, response, sigma = MIXES[name]
    count = given.steps * ranks * given.pairs_per_rank
    ratios = []
    for seed in range(given.rounds):
        lengths = mixed_lengths(count, prompt=prompt, response=response, sigma=sigma, longest=LONGEST, seed=seed)
        ratios.append(step_ratios(lengths, given, ranks))
    report.measured(f"{ranks} ranks, {name}", ratios)
    columns = [Spread.of([ratio[key] for ratio in ratios]).text() for key in (PADDED, SORTED, OURS)]
    gain = Spread.of([ratio[PADDED] / ratio[OURS] for ratio in ratios]).text(unit="x")
    return (str(ranks), f"{name} ({prompt} + {response}, sigma {sigma})", *columns, gain)


def measure(report: Report, given: argparse.Namespace) -> None:
    """The same plans carried out by a small model on two ranks under ZeRO-3."""
    rows = []
    steps, ranks = 2, available_ranks()
    pairs = ranks * given.pairs_per_rank
    with work_folder(given.folder) as folder:
        model = make_model(folder / "model", SMALL)
        for name, (prompt, response, sigma) in MIXES.items():
            max_steps = 2 + given.rounds * steps
            sizes = {"prompt": prompt // 4, "response": response // 4, "longest": LONGEST // 4}
            lengths = mixed_lengths(max_steps * pairs, sigma=sigma, **sizes)
            (folder / name).mkdir()
            task = Task(
                model=model,
                data=write_rows(folder / name / "train.jsonl", random_rows(lengths, SMALL.vocabulary)),
                folder=folder / name,
                pairs_per_step=pairs,
                max_steps=max_steps,
                ranks=ranks,
                dtype=default_dtype(),
            )
            budget = {"tokens_per_micro_batch": given.micro_batch_tokens // 4}
            sides = [
                ours(SORTED, task, data={"layout": "padded"}, batch={"pairs_per_micro_batch": 4}),
                ours(OURS, task, data={"layout": "packed"}, batch=budget),
            ]
            found = run_sides(sides, rounds=given.rounds, steps=steps)
            report.measured(f"measured, {name}", raw(found, None))
            trained = lengths[2 * pairs :]
            smaller = argparse.Namespace(**{**vars(given), "micro_batch_tokens": given.micro_batch_tokens // 4})
            plans = step_ratios(trained, smaller, ranks)
            rows.append(
                (
                    name,
                    f"{plans[SORTED] / plans[OURS]:.2f}x",
                    *(Spread.of(speedups(found[SORTED], found[OURS], clock)).text(unit="x") for clock in CLOCKS),
                )
            )
    columns = ("mix, lengths a quarter as long", "by the plans", "by CPU time", "by wall clock")
    title = f"{OURS} against {SORTED}, trained on {ranks} ranks under ZeRO-3"
    note = (
        "The plans count positions of the layers. The output head, which gets response tokens alone in either layout "
        "and is a large part of so small a model, gains nothing."
    )
    report.table(Table(title, columns, tuple(rows), note))


def step_ratios(lengths: np.ndarray, given: argparse.Namespace, ranks: int) -> dict[str, float]:
    """Positions computed per useful token, ranks in step, over all steps: of TRL's plan, a sorted one, and ours."""
    size = ranks * given.pairs_per_rank
    computed = {PADDED: 0, SORTED: 0, OURS: 0}
    for start in range(0, len(lengths), size):
        step = np.arange(start, start + size)
        by_length = step[np.argsort(-(lengths[step, 0] + lengths[step, 1:].max(1)), kind="stable")]
        computed[PADDED] += step_cost(in_fours(step, ranks), lengths, layout="padded")
        computed[SORTED] += step_cost(in_fours(by_length, ranks), lengths, layout="padded")
        plan = plan_step(
            lengths,
            consumed_pairs=start,
            pairs_per_step=size,
            world_size=ranks,
            budget=MicroBatchBudget(tokens=given.micro_batch_tokens),
            seed=0,
            shuffle=False,
            layout="packed",
        )
        computed[OURS] += step_cost(plan.micro_batches, lengths, layout="packed")
    useful = int(lengths.sum()) / ranks
    return {name: tokens / useful for name, tokens in computed.items()}


def in_fours(order: np.ndarray, ranks: int) -> MicroBatches:
    """Micro-batches of four pairs, dealt to the ranks in turn as Hugging Face's sampler deals batches."""
    batches = [tuple(order[start : start + 4].tolist()) for start in range(0, len(order), 4)]
    return tuple(tuple(batches[rank::ranks]) for rank in range(ranks))


if __name__ == "__main__":
    main()
