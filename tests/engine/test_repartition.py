"""A checkpoint is taken up by other ranks, stages and optimizers bit for bit: weights, moments, counts and schedule."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsdpo.engine.deepspeed_keys import lookup
from tests.engines import planned, policy_of, train_steps
from tests.ranks import run_ranks
from tests.runs import CPU, POLICIES, settings, write_json
from tests.tiny import random_batch

# Several flat partitions a rank, whose borders lie elsewhere for other ranks.
SUB_GROUPS = {"zero_optimization": {**POLICIES["zero3"]["zero_optimization"], "sub_group_size": 3000}}
ACCUMULATED = {**POLICIES["zero1"], "data_types": {"grad_accum_dtype": "fp32"}}  # by BF16_Optimizer in bfloat16
ROUND_ROBIN = {
    "zero_optimization": {**POLICIES["zero2"]["zero_optimization"], "round_robin_gradients": True},
}
LEAN = {"zero_optimization": {**POLICIES["zero1"]["zero_optimization"], "elastic_checkpoint": True}}
OFFLOAD_2 = {"zero_optimization": {**POLICIES["zero2"]["zero_optimization"], "offload_optimizer": CPU}}
KINDS = {
    **POLICIES,
    "sub_groups": SUB_GROUPS,
    "accumulated": ACCUMULATED,
    "robin": ROUND_ROBIN,
    "lean": LEAN,
    "offload2": OFFLOAD_2,
}
SOURCES = ["zero1", "zero3", "zero3_offload", "robin"]
TARGETS = {1: ["zero1", "zero3_offload"], 2: ["zero3", "offload2", "robin"], 3: ["sub_groups"]}


def run_of(
    folder: Path, inputs: Path, kind: str, optimizer: dict[str, Any] | None = None, **sections: Any
) -> dict[str, Any]:
    """A run with two groups of parameters (decayed or not) and a learning rate that falls."""
    folder.mkdir(exist_ok=True)
    return settings(
        folder,
        inputs,
        optimizer={"learning_rate": 1e-2, "weight_decay": 0.01, **(optimizer or {})},
        deepspeed=write_json(folder / f"{kind}.json", KINDS[kind]),
        **sections,
    )


def facts_of(policy: Any) -> dict[str, Any]:
    """Every weight and moment whole, and what steers the next update. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from dsdpo.engine.shards import whole_state_dict

    optimizer = policy.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed 0.19 links what is there after the first group's step
        optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, Any] = {"lr": policy.get_lr(), "steps": policy.global_steps}
    states = list(optimizer.optimizer.state.values())
    found["counts"] = {int(state["step"]) for state in states if "step" in state}
    keys = [
        key
        for key, value in states[0].items()
        if isinstance(value, torch.Tensor) and value.dim() and all(key in state for state in states)
    ]
    assert keys or "Muon" in type(optimizer.optimizer).__name__, "no states to compare"
    found |= whole_state_dict(policy.module, keep=True) or {}
    # DeepSpeed 0.19.8 mixes parameters up when it is asked for these: there only what follows from them is compared.
    mixed_up = lookup(policy.config, "zero_optimization.round_robin_gradients")
    for name, parameter in policy.module.named_parameters():
        if parameter.requires_grad and not mixed_up:
            found[f"{name}/fp32"] = safe_get_full_fp32_param(parameter).clone()
            for key in keys:
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() & expected.keys() >= {"lr", "steps", "counts"}
    return [
        name
        for name, value in expected.items()
        if name in found
        and not (torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value)
    ]


def save_all(runs: dict[str, dict[str, Any]], folder: Path) -> list[float]:
    """Train each run a little and save it, with what it then is and the margins of two steps more."""
    from dsdpo.distributed import rank
    from dsdpo.engine.quirks.checkpoint_files import TAG, save_engine

    spread = []
    for name, run in runs.items():
        policy = policy_of(planned(run))
        train_steps(policy, [random_batch(4, seed=seed, vocab=60) for seed in range(3)])
        (folder / name / TAG).mkdir(parents=True, exist_ok=True)
        save_engine(policy, folder / name)
        facts = facts_of(policy)
        facts["later"] = torch.tensor(train_steps(policy, [random_batch(4, seed=seed, vocab=60) for seed in (3, 4)]))
        if rank() == 0:
            torch.save(facts, folder / name / "facts.pt")
        spread.append(float((facts["later"][0] - facts["later"][1]).abs()))
    return spread


def load_all(runs: dict[str, dict[str, Any]], folder: Path, sources: list[str]) -> dict[str, Any]:
    """Load each of the saved into an engine of each run; what differs, and how far off the next margins are."""
    from dsdpo.engine.quirks.checkpoint_files import load_engine

    report = {}
    for name, run in runs.items():
        plan = planned(run)
        for source in sources:
            expected = torch.load(folder / source / "facts.pt")
            later = expected.pop("later")
            policy = policy_of(plan)
            load_engine(policy, folder / source)
            wrong = differences(facts_of(policy), expected)
            margins = train_steps(policy, [random_batch(4, seed=seed, vocab=60) for seed in (3, 4)])
            report[f"{source} -> {name}"] = (wrong, float((torch.tensor(margins) - later).abs().max()))
    return report


def check(reports: list[dict[str, Any]], *, tolerance: float) -> None:
    for report in reports:
        for case, (wrong, gap) in report.items():
            assert wrong == [], case
            assert gap < tolerance, case


def test_any_ranks_and_stage_take_up_what_was_saved(inputs: Path, tmp_path: Path) -> None:
    runs = {kind: run_of(tmp_path / "from", inputs, kind) for kind in SOURCES}
    for spread in run_ranks(2, save_all, runs, tmp_path / "saved"):
        assert min(spread) > 1e-6, "nothing was learned, so nothing is compared"
    for ranks, kinds in TARGETS.items():
        for turn, kind in enumerate(kinds):  # every kind takes up half of them, every number of ranks all or half
            target = {kind: run_of(tmp_path / f"on{ranks}", inputs, kind)}
            check(run_ranks(ranks, load_all, target, tmp_path / "saved", SOURCES[turn % 2 :: 2]), tolerance=1e-5)


def test_bfloat16_and_adapters(inputs: Path, tmp_path: Path) -> None:
    half = {"model": {"dtype": "bfloat16"}}
    lora = {"model": {"lora": {"r": 4}}}
    runs = {
        "accumulated": run_of(tmp_path / "a", inputs, "accumulated", **half),
        "zero3": run_of(tmp_path / "b", inputs, "zero3", **half),
    }
    run_ranks(2, save_all, runs, tmp_path / "half")
    for source, kind in (("accumulated", "zero2"), ("zero3", "accumulated"), ("accumulated", "sub_groups")):
        target = {kind: run_of(tmp_path / "c", inputs, kind, **half)}
        check(run_ranks(1, load_all, target, tmp_path / "half", [source]), tolerance=0.2)
    run_ranks(2, save_all, {"zero3": run_of(tmp_path / "d", inputs, "zero3", **lora)}, tmp_path / "lora")
    targets = {kind: run_of(tmp_path / "e", inputs, kind, **lora) for kind in ("zero1", "zero3")}
    check(run_ranks(1, load_all, targets, tmp_path / "lora", ["zero3"]), tolerance=1e-5)


def test_lion_and_sgd_move_too(inputs: Path, tmp_path: Path) -> None:
    others = {"lion": {"type": "lion", "learning_rate": 1e-3}, "sgd": {"type": "sgd", "momentum": 0.9}}
    runs = {name: run_of(tmp_path / "from", inputs, "zero3", optimizer) for name, optimizer in others.items()}
    for spread in run_ranks(2, save_all, runs, tmp_path / "saved"):
        assert min(spread) > 1e-6, "nothing was learned, so nothing is compared"
    for name in ("lion", "sgd"):
        target = {name: run_of(tmp_path / "to", inputs, "zero1", others[name])}
        check(run_ranks(1, load_all, target, tmp_path / "saved", [name]), tolerance=1e-3)


MUON = {"type": "muon", "momentum": 0.9, "adam_learning_rate": 1e-3}


def test_muons_momentum_moves_between_whole_matrices_and_partitions(inputs: Path, tmp_path: Path) -> None:
    """DeepSpeed keeps it for whole matrices at stages 1 and 2 on the device, elsewhere cut as the weights are."""
    saved = tmp_path / "saved"
    runs = {kind: run_of(tmp_path / "from", inputs, kind, MUON) for kind in ("zero2", "sub_groups")}
    for spread in run_ranks(2, save_all, runs, saved):
        assert min(spread) > 1e-6, "nothing was learned, so nothing is compared"
    targets = [
        (1, "zero3", ["zero2"]),
        (2, "offload2", ["sub_groups"]),
        (3, "zero1", ["zero2", "sub_groups"]),
    ]
    for ranks, kind, sources in targets:
        target = {kind: run_of(tmp_path / f"on{ranks}", inputs, kind, MUON)}
        check(run_ranks(ranks, load_all, target, saved, sources), tolerance=1e-3)
        for source in sources:
            assert run_ranks(ranks, moved_states, target[kind], saved / source, tmp_path / f"{source}-{ranks}")[0] == []


def moved_states(run: dict[str, Any], source: Path, target: Path) -> list[str]:
    """Load and save again; the states that are not what they were, or are all zero."""
    from dsdpo.engine.quirks.checkpoint_files import TAG, load_engine, save_engine
    from dsdpo.engine.quirks.saved_partitions import read_checkpoint

    policy = policy_of(planned(run))
    load_engine(policy, source)
    (target / TAG).mkdir(parents=True, exist_ok=True)
    save_engine(policy, target)
    before, after = read_checkpoint(source / TAG), read_checkpoint(target / TAG)
    wrong = []
    for name, shape in {name: shape for group in before.model["param_shapes"] for name, shape in group.items()}.items():
        assert before.states_of(name) == after.states_of(name)
        for key in before.states_of(name):
            values = torch.empty(2, shape.numel())
            before.read(name, key, values[0], 0)
            after.read(name, key, values[1], 0)
            if not torch.equal(values[0], values[1]) or not values[0].any():
                wrong.append(f"{key} of {name}")
    return wrong


@pytest.mark.nightly  # DeepSpeed's CPU Lion takes minutes to compile
def test_lion_moves_to_host_memory_and_back(inputs: Path, tmp_path: Path) -> None:
    lion = {"type": "lion", "learning_rate": 1e-3}
    for source, target in (("zero2", "offload2"), ("offload2", "zero2")):
        folder = tmp_path / source
        run_ranks(2, save_all, {source: run_of(tmp_path / "from", inputs, source, lion)}, folder)
        moved = {target: run_of(tmp_path / "to", inputs, target, lion)}
        for report in run_ranks(2, load_all, moved, folder, [source]):
            ((_, gap),) = report.values()
            assert gap < 1e-3


def refusals(cases: list[tuple[dict[str, Any], Path]]) -> list[str]:
    """What each run says on loading what is in the folder beside it."""
    from dsdpo.engine.quirks.checkpoint_files import load_engine
    from dsdpo.errors import CheckpointError

    said = []
    for run, folder in cases:
        policy = policy_of(planned(run))
        with pytest.raises(CheckpointError) as raised:
            load_engine(policy, folder)
        said.append(str(raised.value))
    return said


def test_what_cannot_be_moved_is_named(inputs: Path, tmp_path: Path) -> None:
    run, saved = run_of(tmp_path / "a", inputs, "zero1"), tmp_path / "saved"
    run_ranks(2, save_all, {"zero1": run, "lean": run_of(tmp_path / "b", inputs, "lean")}, saved)
    broken = shutil.copytree(saved / "zero1", saved / "broken")
    (broken / "policy" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    cases = {
        r"cannot change ranks, ZeRO stage or offload with .* elastic_checkpoint": (run, saved / "lean"),
        r"\d+ parameters are trained in one of them only, the first is": (
            run_of(tmp_path / "c", inputs, "zero1", model={"lora": {"r": 4}}),
            saved / "zero1",
        ),
        r"2 groups of parameters and this run's has 1: optimizer.weight_decay": (
            {**run, "optimizer": {"learning_rate": 1e-2}},
            saved / "zero1",
        ),
        r"optimizer states of ranks \[0\], but 2 ranks saved it": (run, broken),
    }
    for pattern, message in zip(cases, run_ranks(1, refusals, list(cases.values()))[0], strict=True):
        assert re.search(pattern, message)
