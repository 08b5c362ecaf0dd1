"""What a step takes on many nodes, from one node and the links: the model held against throttled links, and its tables.

python -m benchmarks.scale_model [--parts rig tables]                                   (the rig needs root and Debian)
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness.common import Report, Spread, Table, parser, work_folder
from benchmarks.harness.inputs import LLAMA_8B, Size, make_model, mixed_lengths, random_rows, same_lengths, write_rows
from benchmarks.harness.processes import Side, environment
from benchmarks.harness.scale import (
    Profile,
    at_share_of_peak,
    by_bandwidth,
    imbalance_of,
    link_bytes,
    profile_of,
    scaled,
)
from benchmarks.harness.sides import Task, ours
from benchmarks.harness.throttled import Place, Turn, check_machine, folder_of, on_hosts, raw, take_turns
from dsdpo.estimate.traffic import Exchange

MBIT = 1e6 / 8
WARMUP = 2
PROBED = {"gather": 12, "all-reduce": 3}  # collectives in a turn
ALLOWED = 0.15
PAIRS = 2  # of a rank
SMALL_LAYERS = Size(hidden=256, layers=6, heads=4, kv_heads=2, vocabulary=2048, intermediate=704)
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
}
# No collective runs beside arithmetic, so that both stand in the step.
ZERO: dict[str, dict[str, Any]] = {
    "ZeRO-3": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 1_000_000, **NOTHING_KEPT},
    "ZeRO-2": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1_000_000},
}
CASES = (
    ("ZeRO-3", Place(2, 1)),
    ("ZeRO-3", Place(4, 1)),
    ("ZeRO-3", Place(2, 2)),
    ("ZeRO-2", Place(2, 1)),
)
ONE, MANY, PROBE = "one host", "all hosts", "collectives"


def main() -> None:
    """Measure, predict and report."""
    given = options().parse_args()
    report = Report("scale_model", "A step on many nodes, predicted", given)
    os.environ |= environment()
    with work_folder(given.folder) as folder:
        if "rig" in given.parts:
            check_machine()
            rig_part(report, given, folder)
        if "tables" in given.parts:
            for table in size_tables(given, folder):
                report.table(table)
    report.write()


def options() -> argparse.ArgumentParser:
    """Those of all benchmarks, links and devices."""
    found = parser("scale_model", "A step on many nodes, predicted and measured.", rounds=3, steps=2)
    found.add_argument("--parts", nargs="+", default=["rig", "tables"], choices=["rig", "tables"])
    found.add_argument("--mbit", type=float, nargs="+", default=[25, 50, 100], help="of each host's cable, Mbit/s")
    found.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="which of CASES")
    found.add_argument("--gpu", default="h100", help="device of the tables, by dsdpo estimate's names")
    found.add_argument("--reached", type=float, default=0.4, help="of a device's peak on one node, recomputation too")
    return found


def rig_part(report: Report, given: argparse.Namespace, folder: Path) -> None:
    """Runs on hosts behind throttled cables, beside what the model says of them."""
    rows = []
    make_model(folder / "model", SMALL_LAYERS)
    for number in given.cases:
        zero, place = CASES[number]
        found = measured_case(given, folder_of(folder, f"case {number}"), folder / "model", zero, place)
        report.measured(f"{zero}, {place.nodes} hosts x {place.per_node}", found)
        rows += case_rows(zero, place, found)
        report.content["tables"] = [asdict(rig_table(rows, given))]
        report.write()
    print("\n" + rig_table(rows, given).markdown())


def measured_case(given: argparse.Namespace, folder: Path, model: Path, zero: str, place: Place) -> dict[str, Any]:
    """All turns of a case: the run on one host and on all, and collectives of the sizes that it has."""
    from tests.cluster.hosts import Hosts

    ranks, rates = place.nodes * place.per_node, [mbit * MBIT for mbit in given.mbit]
    with Hosts(place.nodes) as hosts:
        sides = {}
        for name, where in ((ONE, Place(1, ranks)), (MANY, place)):
            one = run_side(given, folder_of(folder, name), model, zero, ranks)
            sides[name] = (on_hosts(one, hosts, where), given.steps)
        exchanges = exchanges_of(Path(one.arguments[0]), ranks)
        for kind, size in kinds_of(exchanges):
            name = f"{kind} {size}"
            probe = Side(name, "benchmarks.measured.collective", (kind, str(size)), folder_of(folder, name) / "turns")
            sides[name] = (on_hosts(probe, hosts, place), PROBED[kind])
        turns = take_turns(hosts, sides, rates=rates, rounds=given.rounds, warmup=WARMUP)
    return {"exchanges": [asdict(one) for one in exchanges], "turns": raw(turns)}


def run_side(given: argparse.Namespace, folder: Path, model: Path, zero: str, ranks: int) -> Side:
    """A run of pairs so short that what it sends weighs more than what it computes."""
    rows = random_rows(same_lengths(PAIRS * ranks, 24, 8), SMALL_LAYERS.vocabulary)
    task = Task(
        model=model,
        data=write_rows(folder / "train.jsonl", rows),
        folder=folder,
        pairs_per_step=PAIRS * ranks,
        max_steps=WARMUP + given.steps * given.rounds * len(given.mbit) + 1,
        ranks=ranks,
        zero=ZERO[zero],
    )
    return ours("run", task, batch={"pairs_per_micro_batch": PAIRS}, tracking={"every_steps": 1})


def exchanges_of(run_yaml: Path, ranks: int) -> tuple[Exchange, ...]:
    """What `dsdpo estimate` says that a step of the run sends, on ranks with a CPU each."""
    from dsdpo.config.load import load_run, run_parser
    from dsdpo.estimate.hardware import hardware
    from dsdpo.estimate.seconds import Machine
    from dsdpo.run.estimate import forecast_of, subject_of

    run, _ = load_run([str(run_yaml)], run_parser("benchmarks.scale_model", ""))
    machine = Machine(hardware("cpu", ranks_per_node=1), ranks, 1)
    return forecast_of(subject_of(run, run_yaml, tokens=None, ranks=ranks), machine).time.exchanges


def kinds_of(exchanges: Sequence[Exchange]) -> Iterator[tuple[str, int]]:
    """The kinds of collectives among them with the mean size of one, each once."""
    yield from {(kind_of(one), round(one.size / one.count)): None for one in exchanges}


def kind_of(exchange: Exchange) -> str:
    """How gloo does it: a reduce-scatter as an all-reduce."""
    return "gather" if exchange.laps == 1 else "all-reduce"


@dataclass(frozen=True)
class Point:
    """One rate: predictions beside measurements."""

    rate: float
    sent: float  # bytes a step over a cable, measured over predicted
    seconds: list[float]  # measured, of each round
    by_rate: list[float]  # predicted from the cable's rate
    by_probe: list[float]  # predicted from collectives timed on it


def by_collectives(timed: dict[tuple[str, int], float]) -> Callable[[Exchange], float]:
    """Seconds of collectives of which one of each kind's mean size has been timed."""
    return lambda exchange: exchange.count * timed[kind_of(exchange), round(exchange.size / exchange.count)]


def points_of(found: dict[str, Any], ranks: int) -> list[Point]:
    """Each rate of a case, round by round."""
    exchanges = [Exchange(**one) for one in found["exchanges"]]
    turns = {name: [Turn(**one) for one in of_side] for name, of_side in found["turns"].items()}
    points = []
    for rate in sorted({turn.rate for turn in turns[MANY]}):
        at = [number for number, turn in enumerate(turns[MANY]) if turn.rate == rate]
        timed = {
            (kind, size): median(turns[f"{kind} {size}"][number].seconds for number in at)
            for kind, size in kinds_of(exchanges)
        }
        # A step's arithmetic is that of the run on one host, where what it sends stays in memory.
        profiles = [Profile(turns[ONE][number].seconds, 0.0, 0.0) for number in at]
        by_rate, by_probe = (
            [scaled(profile, exchanges, seconds, overlap=False).total for profile in profiles]
            for seconds in (by_bandwidth(rate, ranks), by_collectives(timed))
        )
        sent = median(turns[MANY][number].sent for number in at) / sum(one.sent(ranks) for one in exchanges)
        points.append(Point(rate, sent, [turns[MANY][number].seconds for number in at], by_rate, by_probe))
    return points


def case_rows(zero: str, place: Place, found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each rate."""
    for point in points_of(found, place.nodes * place.per_node):
        ratios = [
            [one / real for one, real in zip(predicted, point.seconds, strict=True)]
            for predicted in (point.by_rate, point.by_probe)
        ]
        yield (
            f"{zero}, {place.nodes} x {place.per_node}",
            f"{point.rate / MBIT:.0f}",
            f"{1 / point.sent:.3f}",
            Spread.of(point.seconds).text(),
            f"{median(point.by_rate):.2f}",
            Spread.of(ratios[0]).text(unit="x"),
            f"{median(point.by_probe):.2f}",
            Spread.of(ratios[1]).text(unit="x"),
        )


def rig_table(rows: Sequence[tuple[str, ...]], given: argparse.Namespace) -> Table:
    """All cases."""
    columns = (
        "stage, hosts x ranks",
        "Mbit/s",
        "bytes over a cable, predicted / counted",
        "s a step, measured",
        "predicted from the rate",
        "predicted / measured",
        "predicted from collectives timed on the cable",
        "predicted / measured",
    )
    note = (
        f"Simulated hosts behind cables throttled by tc; a Llama of 5 M parameters in fp32; {given.rounds} rounds, in "
        "each of which every rate is set once, in random order, and at each the run on one host (the profile), the run "
        f"on all hosts and single collectives take turns. Aim: within {ALLOWED:.0%}."
    )
    return Table("Throttled cables", columns, tuple(rows), note)


# Llama 3's 70B, and what the tables are made for: parameters, GPUs, tokens of a micro-batch, pairs of a step.
LLAMA_70B = Size(8192, 80, 64, 8, 128_256, 8192, intermediate=28_672, tied=False, dtype="bfloat16")
SIZES = {
    "8B": (LLAMA_8B, (8, 16, 32, 64), 16_384, 256),
    "70B": (LLAMA_70B, (32, 64, 128, 256, 512), 8192, 512),
}
PER_NODE = 8
CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"


@dataclass(frozen=True)
class Variant:
    """A change of settings."""

    name: str
    policy: str = "zero3.json"
    zero: dict[str, Any] | None = None  # laid over the policy's block
    tokens: int = 1  # times the tokens of a micro-batch
    pairs: int = 1  # times the pairs of a step


AS_IT_IS = Variant("as it is")
VARIANTS = (
    Variant("ZeRO-2", policy="zero2.json"),
    Variant("hpZ 8", zero={"zero_hpz_partition_size": PER_NODE}),
    Variant("twice the tokens a micro-batch", tokens=2),
)
MORE_PAIRS = Variant("four times the pairs a step", pairs=4)


def size_tables(given: argparse.Namespace, folder: Path) -> Iterator[Table]:
    """What each number of GPUs takes, and which change gains most there."""
    for name, (size, counts, tokens, pairs) in SIZES.items():
        model = folder / name
        write_config(model, size)
        lengths = mixed_lengths(8 * 4 * pairs)
        rows = [size_row(given, model, size, lengths, count, tokens, pairs) for count in counts]
        columns = (
            "GPUs",
            "pairs a GPU",
            "GiB a step over a node's network, each way",
            "arithmetic, s",
            "costliest rank / mean",
            "collectives, s",
            "s a step",
            "pairs/s",
            "efficiency",
            "best of other settings",
            "four times the pairs a step",
        )
        note = (
            f"Predicted, not measured: {given.gpu}, {PER_NODE} a node, {given.reached:.0%} of the peak on one node; "
            "all weights train in bfloat16 under zero3.json with a reference under reference/zero3.json; "
            f"{pairs} pairs a step (lognormal, medians 384 + 160 + 160 tokens), {tokens:,} tokens a micro-batch. "
            "Efficiency: of ranks that wait neither for each other nor for a link. The last columns in pairs/s: the "
            f"best that fits of {', '.join(variant.name for variant in VARIANTS)}; and more pairs a step, which is "
            "another training run, of fewer updates."
        )
        yield Table(f"Llama {name} on many GPUs", columns, tuple(rows), note)


def write_config(folder: Path, size: Size) -> None:
    """A model folder with nothing but its config.json."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=size.tied,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def size_row(
    given: argparse.Namespace, model: Path, size: Size, lengths: np.ndarray, count: int, tokens: int, pairs: int
) -> tuple[str, ...]:
    """One number of GPUs."""

    def of(variant: Variant) -> dict[str, Any]:
        return forecast_variant(given, model, size, lengths, count, tokens, pairs, variant)

    def gain(found: dict[str, Any]) -> str:
        return f"{found['pairs_per_s']:.1f} ({found['pairs_per_s'] / base['pairs_per_s'] - 1:+.0%})"

    base, more = of(AS_IT_IS), of(MORE_PAIRS)
    fitting = {variant.name: found for variant in VARIANTS if (found := of(variant))["fits"]}
    fitting[AS_IT_IS.name] = base
    best = max(fitting, key=lambda name: fitting[name]["pairs_per_s"])
    better = fitting[best]["pairs_per_s"] > 1.01 * base["pairs_per_s"]
    return (
        f"{count}" + ("" if base["fits"] else " (too small)"),
        f"{pairs / count:g}",
        f"{base['between'] / 2**30:.0f}",
        f"{base['arithmetic']:.2f}",
        f"{base['imbalance']:.2f}",
        f"{base['collectives']:.2f}",
        f"{base['step']:.2f}",
        f"{base['pairs_per_s']:.1f}",
        f"{base['efficiency']:.0%}",
        f"{best}: {gain(fitting[best])}" if better else AS_IT_IS.name,
        gain(more),
    )


def forecast_variant(
    given: argparse.Namespace,
    model: Path,
    size: Size,
    lengths: np.ndarray,
    count: int,
    tokens: int,
    pairs: int,
    variant: Variant,
) -> dict[str, Any]:
    """A step of these settings, and whether it fits."""
    from dsdpo.config.run import RunConfig
    from dsdpo.data.binning import MicroBatchBudget
    from dsdpo.estimate.hardware import hardware
    from dsdpo.estimate.seconds import EFFICIENCY, Machine, overlaps
    from dsdpo.run.estimate import configs_of, forecast_of, with_models
    from dsdpo.run.plan import Layout

    policy = json.loads((CONFIGS / variant.policy).read_text())
    policy["zero_optimization"] |= variant.zero or {}
    path = model / "policy.json"
    path.write_text(json.dumps(policy))
    tokens, pairs = tokens * variant.tokens, pairs * variant.pairs
    run = RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": "nowhere.jsonl"},
            "reference": {"score_tokens": tokens, "deepspeed": str(CONFIGS / "reference" / "zero3.json")},
            "batch": {"tokens_per_micro_batch": tokens, "pairs_per_step": pairs},
            "deepspeed": str(path),
            "output_dir": str(model / "run"),
        }
    )
    subject = with_models(run, "run.yaml", lengths=lengths, layout=Layout("packed"), hidden_size=size.hidden)
    machine = Machine(hardware(given.gpu, ranks_per_node=PER_NODE), count, PER_NODE)
    machine = at_share_of_peak(machine, given.reached, EFFICIENCY)
    found = forecast_of(subject, machine)
    imbalance = imbalance_of(lengths, ranks=count, pairs_per_step=pairs, budget=MicroBatchBudget(tokens=tokens))
    hidden = overlaps(configs_of(subject, machine)[0])
    step = scaled(profile_of(found.time), found.time.exchanges, machine.seconds, imbalance=imbalance, overlap=hidden)
    return {
        "fits": found.fits,
        "between": link_bytes(found.time.exchanges, machine)[1],
        "arithmetic": step.arithmetic,
        "collectives": step.collectives,
        "imbalance": imbalance,
        "step": step.total,
        "pairs_per_s": pairs / step.total,
        "efficiency": step.efficiency,
    }


if __name__ == "__main__":
    main()
