"""What `dsdpo estimate` predicts of memory beside what runs take, by strategy, stage, offload, LoRA, QLoRA and split.

python -m benchmarks.estimate_error
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.common import Report, Table, parser, work_folder
from benchmarks.harness.inputs import Size, make_model, random_rows, same_lengths, write_rows
from benchmarks.harness.processes import EXACT_MEMORY, environment

RANKS = 2
SIZE = Size(hidden=512, layers=4, heads=8, kv_heads=4, vocabulary=8192)
PROMPT, RESPONSE, PAIRS = 96, 32, 8
MIB = 2**20
ALLOWED = 0.15

HOST = {"device": "cpu", "pin_memory": False}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
BUCKET = {"reduce_bucket_size": "auto"}
STAGE3 = {**BUCKET, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
FEW_LIVE = {"stage3_max_live_parameters": 3e6, "stage3_max_reuse_distance": 3e6, "stage3_prefetch_bucket_size": 1e6}
ZERO0, ZERO3 = {"zero_optimization": {"stage": 0}}, {"zero_optimization": {"stage": 3, **FEW_LIVE}}
LORA = {"lora": {"r": 16, "target_modules": "all-linear"}}
PLAIN = {"gradient_checkpointing": False}
QUANTIZED = {"quantization": {"bits": 4}}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1}


def zero(stage: int, *, sums: bool = True, **block: Any) -> dict[str, Any]:
    """A policy's DeepSpeed JSON."""
    return {
        **(SUMS if sums else {}),
        "zero_optimization": {"stage": stage, **(STAGE3 if stage == 3 else BUCKET), **block},
    }


# Name, the policy's JSON, the reference's (None: derived), settings of the model, of the reference, dtype.
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any], dict[str, Any], str], ...] = (
    ("ZeRO-1, separate", zero(1), None, {}, {}, "bfloat16"),
    ("ZeRO-1 in fp32, separate", zero(1), ZERO3, {}, {}, "float32"),
    ("ZeRO-2, separate", zero(2), None, {}, {}, "bfloat16"),
    ("ZeRO-2, no checkpointing", zero(2), None, PLAIN, {}, "bfloat16"),
    ("ZeRO-2, optimizer on the host", zero(2, sums=False, offload_optimizer=HOST), ZERO3, {}, {}, "bfloat16"),
    ("ZeRO-2, LoRA, adapter", zero(2), None, LORA, {}, "bfloat16"),
    ("ZeRO-2, precomputed", zero(2), None, {}, {"strategy": "precomputed"}, "bfloat16"),
    ("ZeRO-2, TR-DPO", zero(2), None, {}, SYNC, "bfloat16"),
    ("ZeRO-3, separate", zero(3), None, {}, {}, "bfloat16"),
    ("ZeRO-3, few live parameters", zero(3, sums=False, **FEW_LIVE), ZERO3, {}, {}, "bfloat16"),
    ("ZeRO-3 in fp32, reference at stage 0", zero(3), ZERO0, PLAIN, {}, "float32"),
    ("ZeRO-3, TR-DPO", zero(3), None, {}, SYNC, "bfloat16"),
    ("ZeRO-3, LoRA, adapter", zero(3), None, LORA, {}, "bfloat16"),
    ("ZeRO-3, all on the host", zero(3, offload_optimizer=HOST, offload_param=HOST), None, {}, {}, "bfloat16"),
    ("ZeRO-3, precomputed", zero(3), None, PLAIN, {"strategy": "precomputed"}, "bfloat16"),
    ("ZeRO-2, QLoRA, adapter", zero(2), None, {**LORA, **QUANTIZED}, {}, "bfloat16"),
    ("ZeRO-3, QLoRA, adapter", zero(3), None, {**LORA, **QUANTIZED}, {}, "bfloat16"),
    ("ZeRO-2, reference in 4 bits", zero(2), None, {}, QUANTIZED, "bfloat16"),
    ("ZeRO-2, rows shared by two ranks", zero(2), None, PLAIN, {}, "bfloat16"),
    ("ZeRO-3, rows shared by two ranks", zero(3), None, PLAIN, {}, "bfloat16"),
)
SHARED_ROWS = {"distributed": {"sequence_parallel": 2}, "batch": {"pairs_per_step": PAIRS, "pairs_per_micro_batch": 4}}
COLUMNS = ("run", "held, predicted", "held, measured", "at the peak, predicted", "measured", "error", "peak in")


def main() -> None:
    """Measure and report."""
    given = options().parse_args()
    report = Report("estimate_error", "Predicted memory beside measured memory", given)
    if (given.only or given.again) and given.out.is_file():  # keep the other cases of an earlier run
        report.content["measured"] = json.loads(given.out.read_text())["measured"]
    for name, value in {**environment(), **EXACT_MEMORY}.items():
        os.environ[name] = value
    with work_folder(given.folder) as folder:
        make_model(folder / "model", SIZE)
        rows_of_text = random_rows(same_lengths(32, PROMPT, RESPONSE), SIZE.vocabulary)
        write_rows(folder / "train.jsonl", rows_of_text)
        for number, case in enumerate(CASES):
            if given.only and not any(word in case[0] for word in given.only):
                continue
            made = run_file(folder, number, *case[1:], more=SHARED_ROWS if "shared" in case[0] else {})
            known = report.content["measured"].get(case[0])
            if given.again and known is None:
                continue
            taken = known["measured"] if given.again else measured(made)
            report.measured(case[0], {"measured": taken, "predicted": predicted(made)})
            print(*row(case[0], report.content["measured"][case[0]]), sep=" | ", flush=True)
            report.content["tables"] = [asdict(table(report.content["measured"]))]
            report.write()
    print("\n" + table(report.content["measured"]).markdown())
    worst = max(abs(error(found)) for found in report.content["measured"].values())
    if worst > ALLOWED:
        raise SystemExit(f"off by {worst:.1%}")


def error(found: dict[str, Any]) -> float:
    """Of the predicted peak, as a share of the measured one."""
    return float(found["predicted"]["peak"] / (found["measured"]["static"] + found["measured"]["rise"]) - 1)


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    real, ours = found["measured"], found["predicted"]
    sizes = (ours["held"], real["static"], ours["peak"], real["static"] + real["rise"])
    return (name, *(f"{size / MIB:.1f}" for size in sizes), f"{error(found):+.1%}", ours["phase"])


def table(cases: dict[str, Any]) -> Table:
    """All cases, and the worst of them."""
    worst = max(cases, key=lambda name: abs(error(cases[name])))
    note = (
        f"MiB of tensors on one of {RANKS} ranks, host and device together, which on a CPU are one memory; counted "
        f"storage by storage at a step's end; above that the kernel's peak in two steps. Worst: {worst}, "
        f"{error(cases[worst]):+.1%}; allowed are {ALLOWED:.0%}."
    )
    names = [case[0] for case in CASES if case[0] in cases]
    rows = tuple(row(name, cases[name]) for name in names)
    return Table("A Llama of 17 M parameters, packed pairs", COLUMNS, rows, note)


def options() -> argparse.ArgumentParser:
    """Those of all benchmarks, and which cases to run."""
    found = parser("estimate_error", "Predicted memory beside measured memory.", rounds=1, steps=2)
    found.add_argument("--again", action="store_true", help="keep what was measured and predict it anew")
    found.add_argument("--only", nargs="+", default=[], help="words of the names of cases to run")
    return found


def run_file(
    folder: Path,
    number: int,
    policy: Any,
    own: Any,
    model: dict[str, Any],
    reference: dict[str, Any],
    dtype: str,
    *,
    more: dict[str, Any],
) -> Path:
    """The settings of one case."""
    here = folder / f"case{number}"
    here.mkdir()
    (here / "policy.json").write_text(json.dumps(policy))
    run: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "dtype": dtype, **model},
        "data": {"train": str(folder / "train.jsonl"), "shuffle": False, "cache_dir": str(folder / "cache")},
        "reference": dict(reference),
        "batch": {"pairs_per_step": PAIRS, "pairs_per_micro_batch": PAIRS // RANKS // 2},
        "train": {"max_steps": 4},
        "checkpoint": {"every_steps": 0},
        "deepspeed": str(here / "policy.json"),
        "output_dir": str(here / "run"),
        **more,
    }
    if own is not None:
        (here / "reference.json").write_text(json.dumps(own))
        run["reference"]["deepspeed"] = str(here / "reference.json")
    (here / "run.yaml").write_text(yaml.safe_dump(run))
    return here / "run.yaml"


def predicted(run_yaml: Path) -> dict[str, Any]:
    """The forecast for ranks on a CPU, without what is no tensor."""
    from dsdpo.config.load import load_run, run_parser
    from dsdpo.estimate.forecast import forecast
    from dsdpo.estimate.hardware import hardware
    from dsdpo.estimate.memory import ALLOWANCE
    from dsdpo.estimate.seconds import Machine
    from dsdpo.run.estimate import configs_of, job_of, subject_of

    run, _ = load_run([str(run_yaml)], run_parser("benchmarks.estimate_error", ""))
    subject = subject_of(run, run_yaml, tokens=None, ranks=RANKS)
    machine = Machine(hardware("cpu", ranks_per_node=RANKS), RANKS, RANKS)
    found = forecast(job_of(subject, machine, configs_of(subject, machine)))
    without = sum(size for (part, _), size in found.policy.items() if part == ALLOWANCE)
    phases = {name: size - without for name, size in found.phases.items() if name != "precompute"}
    phase = max(phases, key=lambda name: phases[name])
    return {"peak": phases[phase], "phase": phase, "phases": phases, "held": found.held}


def measured(run_yaml: Path) -> dict[str, Any]:
    """What rank 0 counted, in processes of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "transformers", "dsdpo.run.models"])
    store = tempfile.mkdtemp(prefix="ranks-")
    ranks = [context.Process(target=on_rank, args=(rank, f"{store}/store", str(run_yaml))) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{run_yaml}: a rank failed")
    found: dict[str, Any] = json.loads((run_yaml.parent / "memory-0.json").read_text())
    return found


def on_rank(rank: int, store: str, run_yaml: str) -> None:
    """Be one of the ranks."""
    size = str(RANKS)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"LOCAL_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import deepspeed
    import torch

    from benchmarks.measured.memory_side import main as side
    from dsdpo.engine.quirks.compiled_ops import skip_shared_memory_op

    skip_shared_memory_op()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    deepspeed.init_distributed(verbose=False)
    os._exit(side([run_yaml, str(Path(run_yaml).parent)]))


if __name__ == "__main__":
    main()
