"""TR-DPO on real ranks: whatever the partitions, the reference that answers is the plain average of full tensors."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import RankError, restart, run_ranks
from tests.runs import REFERENCES, settings, train_on

ALPHA = 0.3
HPZ = {"zero_optimization": {**REFERENCES["zero3"]["zero_optimization"], "zero_hpz_partition_size": 2}}
PERSISTENT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100000}}
KINDS = {**REFERENCES, "zero3_persistent": PERSISTENT, "zero3_hpz": HPZ}


def build(run: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Policy engine, reference engine and the prepared plan of a run, in a rank."""
    from dsdpo.config.run import RunConfig
    from dsdpo.engine.build import build_policy, build_reference
    from dsdpo.engine.quirks.compiled_ops import prepare_ops
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run))
    prepare_ops(plan.policy_config, plan.reference_config)
    policy = build_policy(plan.run, plan.policy_config, total_steps=plan.total_steps, layout=plan.layout.name)
    return policy, build_reference(plan.reference.model, plan.reference_config, layout=plan.layout.name), plan


def logps_of_plain_model(plan: Any, weights: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """The answers of a plain model, no DeepSpeed, that holds `weights`."""
    from transformers import AutoModelForCausalLM

    from dsdpo.engine.load import DTYPES
    from dsdpo.objective.logps import ResponseScorer, pair_logps

    options = {"dtype": DTYPES[plan.run.model.dtype], "attn_implementation": "dsdpo"}
    lm = AutoModelForCausalLM.from_pretrained(plan.run.model.path, **options)
    scorer = ResponseScorer(lm)
    scorer.load_state_dict(weights, strict=False)
    with torch.no_grad():
        logps = pair_logps(scorer, batch)
    return torch.cat([logps.chosen, logps.rejected])


def updates(policy: Any, plan: Any, steps: int) -> Iterator[None]:
    """Some optimizer updates that move every weight."""
    from dsdpo.objective.logps import pair_logps

    for window in plan.train.steps(consumed_pairs=0, steps=steps, pairs_per_step=8, seed=0, shuffle=True):
        for part in window.batches:
            policy.backward(-pair_logps(policy, part).chosen.sum(), scale_wrt_gas=False)
        policy.step()
        yield


def average_by_hand(run: dict[str, Any], syncs: int, gather: bool) -> dict[str, Any]:
    """Train, syncing after each step; beside it the same average over whole tensors, in float64 on this rank."""
    from dsdpo.engine.shards import whole_state_dict
    from dsdpo.objective.logps import pair_logps
    from dsdpo.reference.trdpo import MovingAverage, match_parameters

    policy, reference, plan = build(run)
    matches = match_parameters(dict(policy.module.named_parameters()), reference.module)
    average = MovingAverage(matches, reference, alpha=ALPHA, gather=gather, budget=20000)
    names = [name for name, _, _ in matches]
    truth = {name: value.double() for name, value in whole_state_dict(reference.module, keep=True).items()}
    batch = plan.train.largest_batch(torch.device("cpu"))
    with torch.no_grad():
        before = pair_logps(reference, batch)
    received, collectives = [], []
    for _ in updates(policy, plan, syncs):
        with CommDebugMode() as communication:
            received.append(average.move())
        collectives.append(communication.get_total_counts())
        latest = whole_state_dict(policy.module, keep=True)
        for name in names:
            truth[name] = truth[name] * (1 - ALPHA) + latest[name].double() * ALPHA
    moved = whole_state_dict(reference.module, keep=True)
    error = max(float((moved[name].double() - truth[name]).abs().max()) for name in names)
    with torch.no_grad():
        answered = pair_logps(reference, batch)
    plain = logps_of_plain_model(plan, {name: truth[name].to(moved[name].dtype) for name in names}, batch)
    answers = torch.cat([answered.chosen, answered.rejected])
    return {
        "error": error,
        "answers": float((answers - plain).abs().max()),
        "moved": float((torch.cat([before.chosen, before.rejected]) - answers).abs().max()),
        "received": received,
        "collectives": collectives,
        "local": sum(average.local.values()) / len(average.local),
        "weights": {name: moved[name] for name in names},
    }


# From whole weights and from shards, on the device or the host, to every kind of reference. Stages 1 and 2 both hold
# whole weights; stage 3 to stage 3 is below, local and gathered.
PAIRED = [
    *(("zero1", "zero0"), ("zero3_offload", "zero0")),
    *(("zero2", "zero3"), ("zero3_offload", "zero3")),
    ("zero3", "zero3_offload"),
    *(("zero2", "zero3_persistent"), ("zero3", "zero3_persistent")),
    ("zero3", "zero3_hpz"),
]


@pytest.mark.parametrize(("policy", "reference"), PAIRED)
def test_reference_answers_as_the_plain_average(policy: str, reference: str, inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, policy_zero=policy)
    Path(run["reference"]["deepspeed"]).write_text(json.dumps(KINDS[reference]))
    if reference == "zero3_hpz":
        restart(2)
    results = run_ranks(2, average_by_hand, run, 3, False)
    check_average(results)
    if policy.startswith("zero3") and reference != "zero0":
        assert results[0]["local"] == 1.0
        assert results[0]["received"] == results[0]["collectives"] == [0, 0, 0]


def check_average(results: list[dict[str, Any]]) -> None:
    """Of each rank: the reference has moved to the average by hand, and answers as a plain model of it."""
    for result in results:
        assert result["error"] < 1e-6
        assert result["moved"] > 0.5, "the reference did not move, so nothing was tested"
        assert result["answers"] < 1e-3


@pytest.mark.parametrize("policy", ["zero2", "zero3"])
def test_a_reference_on_nvme_moves_too(policy: str, inputs: Path, tmp_path: Path) -> None:
    import deepspeed

    from dsdpo.engine.quirks.compiled_ops import prepare_ops

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio's headers (libaio-dev)")
    # DeepSpeed swaps no shard under 1 MiB.
    run = settings(tmp_path, inputs, policy_zero=policy, model={"path": str(wide_model(tmp_path / "model", inputs))})
    shipped = json.loads((Path(__file__).parents[2] / "ds_configs" / "reference" / "zero3_nvme.json").read_text())
    shipped["zero_optimization"]["offload_param"] |= {"nvme_path": str(tmp_path / "nvme"), "buffer_size": 2_000_000}
    (tmp_path / "nvme").mkdir()
    Path(run["reference"]["deepspeed"]).write_text(json.dumps(shipped))
    prepare_ops(shipped)  # minutes of compiling, for which the ranks' time limit is too short
    for result in run_ranks(2, average_by_hand, run, 2, False):
        assert list((tmp_path / "nvme").rglob("*.swp")), "nothing was on NVMe"
        assert result["error"] < 1e-6
        assert result["moved"] > 0.5
        assert result["answers"] < 1e-3
        assert result["received"] == [0, 0]


def wide_model(folder: Path, inputs: Path) -> Path:
    """Matrices of 4 MiB."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(inputs / "model", hidden_size=1024, intermediate_size=1024, head_dim=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(folder)
    return folder


def test_gathered_equals_local_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    local = run_ranks(2, average_by_hand, settings(tmp_path / "local", inputs), 3, False)
    gathered = run_ranks(2, average_by_hand, settings(tmp_path / "gathered", inputs), 3, True)
    check_average(local + gathered)
    assert local[0]["local"] == 1.0
    assert local[0]["received"] == local[0]["collectives"] == [0, 0, 0]
    assert min(gathered[0]["received"]) > 0 < min(gathered[0]["collectives"])
    for name, value in local[0]["weights"].items():
        assert torch.equal(value, gathered[0]["weights"][name]), name
        assert torch.equal(value, gathered[1]["weights"][name]), name


def captured_in_bf16(run: dict[str, Any], steps: int) -> dict[str, float]:
    """The share of the true movement (average in float64 of the optimizer's float32 weights) that is followed."""
    from deepspeed.utils import safe_get_full_fp32_param

    from dsdpo.engine.shards import whole_state_dict
    from dsdpo.reference.trdpo import MovingAverage, match_parameters

    alpha = 0.01
    policy, reference, plan = build(run)
    matches = match_parameters(dict(policy.module.named_parameters()), reference.module)
    average = MovingAverage(matches, reference, alpha=alpha)
    start = {name: value.clone() for name, value in whole_state_dict(reference.module, keep=True).items()}
    truth = {name: value.double() for name, value in start.items()}
    naive = {name: value.clone() for name, value in start.items()}
    for _ in updates(policy, plan, steps):
        average.move()
        rounded = whole_state_dict(policy.module, keep=True)
        for name, source, _ in matches:
            latest = safe_get_full_fp32_param(source).double().view_as(truth[name])
            truth[name] = truth[name] * (1 - alpha) + latest * alpha
            naive[name].mul_(1 - alpha).add_(rounded[name], alpha=alpha)
    moved = whole_state_dict(reference.module, keep=True)
    world = torch.distributed.get_world_size()
    ours, bf16, true = 0.0, 0.0, 0.0
    for name, _, target in matches:
        step = truth[name] - start[name].double()
        kept = average.averages[name]
        offset = kept.numel() if target.ds_tensor.numel() * world >= target.ds_numel else 0
        first = target.ds_tensor.numel() * torch.distributed.get_rank()
        mine = step.view(-1)[first : first + offset]
        ours += float((mine * (kept.double() - start[name].view(-1)[first : first + offset].double())).sum())
        true += float((mine * mine).sum())
        bf16 += float((mine * (naive[name] - start[name]).double().view(-1)[first : first + offset]).sum())
        assert torch.equal(moved[name].view(-1)[first : first + offset], kept.bfloat16()), name
    return {"ours": ours / true, "bf16": bf16 / true}


def test_small_alpha_in_bf16_moves_as_float32_does(inputs: Path, tmp_path: Path) -> None:
    """A bfloat16 average in place stands still where ours follows the truth."""
    run = settings(tmp_path, inputs, model={"dtype": "bfloat16"}, optimizer={"learning_rate": 3e-5})
    for share in run_ranks(2, captured_in_bf16, run, 10):
        assert share["ours"] == pytest.approx(1.0, abs=0.01)
        assert share["bf16"] < 0.5


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes held by tensors that operations made and nothing has freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._is_view() is False:
                storage = tensor.untyped_storage()
                key = storage._cdata
                known = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.untyped_storage()._cdata == key]
                if key not in self.seen and not known:
                    self.seen.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_of_a_gathered_sync(run: dict[str, Any], budget: int) -> tuple[int, int]:
    """Peak extra bytes of one gathered sync, and the bytes of the model."""
    from dsdpo.engine.shards import parameter_count
    from dsdpo.reference.trdpo import MovingAverage, match_parameters

    policy, reference, _ = build(run)
    average = MovingAverage(
        match_parameters(dict(policy.module.named_parameters()), reference.module),
        reference,
        alpha=0.5,
        gather=True,
        budget=budget,
    )
    with LiveBytes() as memory:
        average.move()
    return memory.peak, 4 * parameter_count(policy.module)


def test_a_gathered_sync_stays_within_its_budget(inputs: Path, tmp_path: Path) -> None:
    model = deep_model(tmp_path / "model", inputs)
    budget = 120_000
    run = settings(tmp_path, inputs, model={"path": str(model)})
    for peak, size in run_ranks(2, peak_of_a_gathered_sync, run, budget):
        assert size >= 10 * budget
        assert 0 < peak <= budget


def deep_model(folder: Path, inputs: Path) -> Path:
    """Many layers, so that no single parameter is a large part of the model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(inputs / "model", num_hidden_layers=10)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(folder)
    return folder


def test_snapshot_gives_the_numbers_of_a_copied_reference(inputs: Path, tmp_path: Path) -> None:
    """α = 1: no reference weights, and the same losses, training and held-out, as an engine that is overwritten."""
    moves = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    shared = {
        "data": {"eval": str(inputs / "few.jsonl")},
        "train": {"max_steps": 5},
        "evaluation": {"every_steps": 2},
    }
    copied = train_on(2, settings(tmp_path / "copied", inputs, reference=moves, **shared))
    snapshot = settings(
        tmp_path / "snapshot",
        inputs,
        reference_zero=None,
        reference={**moves, "strategy": "policy_snapshot"},
        **shared,
    )
    taken = train_on(2, snapshot)
    assert [row["step"] for row in taken] == [row["step"] for row in copied]
    for ours, theirs in zip(taken, copied, strict=True):
        for name in ("loss", "rewards/margins", "eval/loss", "eval/rewards/margins", "reference/age_steps"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-6), (ours["step"], name)
    # Step 4 is that of a sync: held-out pairs are scored before it, when policy and reference are not yet the same.
    [held_out] = [row for row in copied if row["step"] == 4 and "eval/loss" in row]
    assert abs(held_out["eval/rewards/margins"]) > 1e-5


def parameters_alive(run: dict[str, Any]) -> tuple[int, int]:
    """Elements of all parameters in this process while the run's reference answers, and of the policy alone."""
    import gc

    from dsdpo.config.run import RunConfig
    from dsdpo.engine.shards import full_numel, parameter_count
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.run.plan import plan_run

    gc.collect()
    before = {id(item) for item in gc.get_objects() if isinstance(item, torch.nn.Parameter)}
    policy, reference = build_policy_and_reference(plan_run(RunConfig.model_validate(run)))
    gc.collect()
    after = [item for item in gc.get_objects() if isinstance(item, torch.nn.Parameter) and id(item) not in before]
    # ZeRO keeps float32 partitions of the policy as parameters of its own, which have no ds_id.
    models = [item for item in after if hasattr(item, "ds_id")]
    assert reference.identity is not None
    return sum(full_numel(item) for item in models), parameter_count(policy.module)


def test_a_snapshot_run_holds_no_reference_parameters(inputs: Path, tmp_path: Path) -> None:
    moves = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3}
    snapshot = settings(tmp_path / "a", inputs, reference_zero=None, reference={**moves, "strategy": "policy_snapshot"})
    for alive, policy in run_ranks(2, parameters_alive, snapshot):
        assert alive == policy
    copied = settings(tmp_path / "b", inputs, reference=moves)
    for alive, policy in run_ranks(2, parameters_alive, copied):
        assert alive == 2 * policy


def merged_by_peft(run: dict[str, Any], steps: int) -> tuple[float, float]:
    """Largest error of a full reference that follows a LoRA policy, against peft's own merge; largest movement."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from dsdpo.engine.lora import fresh_config, merged_parameters
    from dsdpo.engine.shards import whole_state_dict
    from dsdpo.reference.trdpo import MovingAverage, match_parameters

    policy, reference, plan = build(run)
    average = MovingAverage(
        match_parameters(merged_parameters(policy.module), reference.module), reference, alpha=ALPHA, budget=20000
    )
    start = whole_state_dict(reference.module, keep=True)
    truth = {name: value.double() for name, value in start.items()}
    for _ in updates(policy, plan, steps):
        average.move()
        lm = AutoModelForCausalLM.from_pretrained(plan.run.model.path, dtype=torch.float32)
        plain = get_peft_model(lm, fresh_config(plan.run.model.lora, lm))
        state = whole_state_dict(policy.module, keep=True)
        plain.load_state_dict({name.removeprefix("lm."): value for name, value in state.items()})
        for name, value in plain.merge_and_unload().state_dict().items():
            if f"lm.{name}" in truth:
                truth[f"lm.{name}"] = truth[f"lm.{name}"] * (1 - ALPHA) + value.double() * ALPHA
    moved = whole_state_dict(reference.module, keep=True)
    return (
        max(float((moved[name].double() - truth[name]).abs().max()) for name in truth),
        max(float((moved[name] - start[name]).abs().max()) for name in truth),
    )


@pytest.mark.parametrize("policy", ["zero2", "zero3"])
def test_lora_policy_moves_a_full_reference(policy: str, inputs: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    run = settings(
        tmp_path,
        inputs,
        policy_zero=policy,
        model={"lora": lora},
        reference={"strategy": "separate"},
        optimizer={"learning_rate": 1e-2},
    )
    for error, movement in run_ranks(2, merged_by_peft, run, 3):
        assert error < 1e-6
        assert movement > 1e-3


def saved_and_loaded(run: dict[str, Any], folder: Path) -> bool:
    """Save a reference that has moved, move it on, load it: bit for bit what was saved, averages included."""
    from dsdpo.config.run import RunConfig
    from dsdpo.objective.logps import pair_logps
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run))
    policy, reference = build_policy_and_reference(plan)

    def steps(count: int, start: int) -> None:
        for step in range(start, start + count):
            policy.backward(-pair_logps(policy, batch).chosen.sum(), scale_wrt_gas=False)
            policy.step()
            reference.after_step(step)

    batch = plan.train.largest_batch(torch.device("cpu"))
    steps(3, start=1)
    saved, answers = reference.average.state(), reference.score([batch])[0].chosen
    reference.state().write(folder)
    torch.distributed.barrier()
    steps(4, start=4)
    assert not torch.equal(reference.score([batch])[0].chosen, answers)
    reference.load(folder)
    again = reference.average.state()
    assert (reference.syncs, reference.age) == (1, 1)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    return torch.equal(reference.score([batch])[0].chosen, answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_moving_reference_comes_back_from_its_checkpoint(dtype: str, inputs: Path, tmp_path: Path) -> None:
    moves = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
    run = settings(tmp_path, inputs, model={"dtype": dtype}, reference=moves)
    assert run_ranks(2, saved_and_loaded, run, tmp_path / "state") == [True, True]
    (tmp_path / "state" / "rank-1.safetensors").write_bytes(b"broken")
    with pytest.raises(RankError, match="the moving reference cannot be read"):
        run_ranks(2, load_only, run, tmp_path / "state")


def load_only(run: dict[str, Any], folder: Path) -> None:
    from dsdpo.config.run import RunConfig
    from dsdpo.distributed import all_or_none
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.run.plan import plan_run

    _, reference = build_policy_and_reference(plan_run(RunConfig.model_validate(run)))
    with all_or_none():
        reference.load(folder)
