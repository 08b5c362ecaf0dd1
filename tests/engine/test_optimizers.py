"""Each optimizer under ZeRO takes the steps that it takes on whole matrices in one process.

The plain ones here are torch's own, or written down from their papers in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engines import planned, policy_of, save_lm
from tests.ranks import RankError, run_ranks
from tests.runs import CPU, settings, write_json
from tests.tiny import random_batch, tiny_lm

STEPS, MICRO_BATCHES = 2, 2
RATE, DECAY = 1e-2, 0.1
OPTIONS: dict[str, dict[str, Any]] = {
    "lion": {},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "muon": {"adam_learning_rate": 2e-3},
    "adamw_8bit": {},
}
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": False},
    "zero2_offload": {"stage": 2, "overlap_comm": False, "offload_optimizer": CPU},
    "zero3": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000},
    "zero3_offload": {
        "stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0, "offload_optimizer": CPU,
        "sub_group_size": 5000,
    },
}  # fmt: skip


def run_of(folder: Path, inputs: Path, kind: str, zero: str, **sections: Any) -> dict[str, Any]:
    options = {"type": kind, "learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": 0.0, **OPTIONS[kind]}
    options["lr_scheduler_type"] = "constant"
    run = settings(folder, inputs, reference_zero=None, optimizer=options, **sections)
    run["deepspeed"] = write_json(
        folder / "policy.json", {"zero_optimization": ZERO[zero] | {"reduce_bucket_size": 5000}}
    )
    return run


@pytest.mark.parametrize(
    ("kind", "zero", "ranks"),
    [
        ("lion", "zero1", 1),
        ("lion", "zero3", 2),
        pytest.param("lion", "zero2_offload", 2, marks=pytest.mark.nightly),  # DeepSpeed's compiles for minutes
        ("sgd", "zero2", 2),
        ("sgd", "zero3_offload", 2),
        ("muon", "zero1", 2),
        ("muon", "zero2", 2),
        ("muon", "zero2_offload", 2),
        ("muon", "zero3", 2),
        ("muon", "zero3_offload", 2),
        ("adamw_8bit", "zero1", 1),
        ("adamw_8bit", "zero3", 2),
    ],
)
def test_zero_takes_the_steps_of_the_plain_optimizer(
    kind: str, zero: str, ranks: int, inputs: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path, inputs, kind, zero)
    start, *found = run_ranks(ranks, trained_here, run)[0]
    wanted = plain_steps(run, start, kind, ranks)
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        for name, before in start.items():
            moved = (theirs[name] - before).norm()
            assert moved > 1e-4, f"{name} was not trained"
            # States of 8 bits are rounded after the step that makes them.
            close = 1e-3 if kind != "adamw_8bit" or step == 1 else 0.1
            assert (ours[name] - theirs[name]).norm() < close * moved, f"{name} after step {step}"


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_muon_takes_each_expert_as_a_matrix(zero: str, inputs: Path, tmp_path: Path) -> None:
    model = save_lm(tmp_path / "start", inputs / "model", tiny_lm("mixtral", scale=3.0))
    run = run_of(tmp_path, inputs, "muon", zero, model={"path": model})
    start, first, *_ = run_ranks(2, trained_here, run)[0]
    wanted = plain_steps(run, start, "muon", 2)[0]
    stacks = [name for name, weight in start.items() if weight.dim() == 3]
    assert len(stacks) == 4
    for name in stacks:
        moved = (wanted[name] - start[name]).norm()
        assert (first[name] - wanted[name]).norm() < 1e-2 * moved, name


def test_muon_at_stage_2_with_float32_sums_trains_what_adamw_steps(inputs: Path, tmp_path: Path) -> None:
    """DeepSpeed's reduce_scatter drops such gradients there: norms would stand still, without a word."""
    ends = {}
    for zero in ("zero2", "zero3"):
        run = run_of(tmp_path, inputs, "muon", zero, model={"dtype": "bfloat16"})
        config = {"zero_optimization": ZERO[zero], "data_types": {"grad_accum_dtype": "fp32"}}
        run["deepspeed"] = write_json(tmp_path / "policy.json", config)
        start, *_, ends[zero] = run_ranks(2, trained_here, run)[0]
    for name, before in start.items():
        moved = (ends["zero3"][name] - before).norm()
        assert moved > 1e-4, f"{name} was not trained"
        assert (ends["zero2"][name] - ends["zero3"][name]).norm() < 0.3 * moved, name


def test_experts_that_muon_cannot_take_are_refused_before_the_model_loads(inputs: Path, tmp_path: Path) -> None:
    """DeepSpeed raises ValueError for them at stage 1 in bfloat16 with float32 sums, once it has the whole model."""
    model = save_lm(tmp_path / "start", inputs / "model", tiny_lm("mixtral"))
    run = run_of(tmp_path, inputs, "muon", "zero1", model={"path": model, "dtype": "bfloat16"})
    for sums, refused in (("fp32", True), ("float32", True), (None, False)):
        config = {"zero_optimization": ZERO["zero1"], "data_types": {"grad_accum_dtype": sums} if sums else {}}
        run["deepspeed"] = write_json(tmp_path / "policy.json", config)
        if refused:
            with pytest.raises(RankError, match=r"takes matrices only, and \S+experts\S+ has the shape \[4, "):
                run_ranks(1, is_planned, run)
        else:
            run_ranks(1, is_planned, run)


def is_planned(run: dict[str, Any]) -> bool:
    return planned(run) is not None


# Of 100 steps without warm-up: the step, and the share of the learning rate that it takes by the schedule's definition.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "cosine_with_min_lr": ({"min_lr": RATE / 10}, {0: 1.0, 50: 0.55, 100: 0.1}),
    "cosine_with_restarts": ({"num_cycles": 2}, {25: 0.5, 50: 1.0, 75: 0.5}),
    "polynomial": ({"lr_end": RATE / 2}, {0: 1.0, 50: 0.75, 100: 0.5}),
    "warmup_stable_decay": (
        {"num_decay_steps": 20, "decay_type": "linear", "min_lr_ratio": 0.5},
        {80: 1.0, 90: 0.75, 100: 0.5},
    ),
}


def test_schedules_take_what_they_are_given(inputs: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, inputs, "muon", "zero1")  # which keeps no learning rate of its own for schedules to read
    [found] = run_ranks(1, shares_here, run)
    for name, (_, wanted) in SCHEDULES.items():
        assert found[name] == pytest.approx(wanted), name


def shares_here(run: dict[str, Any]) -> dict[str, dict[int, float]]:
    found = {}
    for name, (options, steps) in SCHEDULES.items():
        own = run["optimizer"] | {"lr_scheduler_type": name, "lr_scheduler_kwargs": options}
        policy = policy_of(planned({**run, "optimizer": own}))
        share = policy.lr_scheduler.lr_lambdas[0]
        found[name] = {step: share(step) for step in steps}
    return found


def test_adafactor_of_a_flat_vector_is_another_optimizer() -> None:
    """Why it is refused: ZeRO hands an optimizer one flat vector."""
    torch.manual_seed(0)
    shapes = [(64, 32), (128, 64)]
    weights = [0.02 * torch.randn(shapes[0]), 0.2 * torch.randn(shapes[1])]
    gradients = [[1e-3 * torch.randn(64, 1) * torch.randn(shapes[0]), torch.randn(shapes[1])] for _ in range(3)]

    def updates(cuts: int) -> tuple[Tensor, int]:
        """All updates as one vector, and numbers kept; `cuts`: 0 for matrices, else parts of the flat vector."""

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return tensors if not cuts else list(torch.cat([t.flatten() for t in tensors]).chunk(cuts))

        parameters = [torch.nn.Parameter(part.clone()) for part in cut(weights)]
        optimizer = torch.optim.Adafactor(parameters, lr=1e-2)
        for step in gradients:
            for parameter, part in zip(parameters, cut(step), strict=True):
                parameter.grad = part
            optimizer.step()
        kept = [value.numel() for state in optimizer.state.values() for value in state.values() if value.dim()]
        flat = [torch.cat([t.detach().flatten() for t in tensors]) for tensors in (parameters, weights)]
        return flat[0] - flat[1], sum(kept)

    (matrices, few), (whole, many), (halves, _) = updates(0), updates(1), updates(2)
    assert (few, many) == (64 + 32 + 128 + 64, 64 * 32 + 128 * 64)
    assert (whole - matrices).norm() / matrices.norm() > 0.3
    assert (halves - whole).norm() / whole.norm() > 0.05


def trained_here(run: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The policy's float32 weights at the start and after each step; Muon iterates in float32, not in float16."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param

    get_accelerator().is_fp16_supported = lambda: False
    policy = policy_of(planned(run))

    def weights() -> dict[str, Tensor]:
        return {name: safe_get_full_fp32_param(p).clone() for name, p in policy.module.named_parameters()}

    found = [weights()]
    for step in range(STEPS):
        for part in range(MICRO_BATCHES):
            policy.backward(loss_of(policy, step, part, dist.get_rank()), scale_wrt_gas=False)
        policy.step()
        found.append(weights())
    del get_accelerator().is_fp16_supported
    return found


def loss_of(model: Any, step: int, part: int, rank: int) -> Tensor:
    from dsdpo.objective.logps import pair_logps

    logps = pair_logps(model, random_batch(2, vocab=60, seed=100 * step + 10 * part + rank))
    return torch.nn.functional.softplus(logps.rejected - logps.chosen).mean()


def plain_steps(run: dict[str, Any], start: dict[str, Tensor], kind: str, ranks: int) -> list[dict[str, Tensor]]:
    """The same in one process with whole matrices."""
    from transformers import AutoModelForCausalLM

    from dsdpo.objective.logps import ResponseScorer

    model = ResponseScorer(AutoModelForCausalLM.from_pretrained(run["model"]["path"], dtype=torch.float32))
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in start.items())
    states: dict[str, dict[str, Tensor]] = {name: {} for name in named}
    found = []
    for step in range(STEPS):
        model.zero_grad()
        for rank in range(ranks):
            for part in range(MICRO_BATCHES):
                (loss_of(model, step, part, rank) / ranks).backward()
        with torch.no_grad():
            for name, weight in named.items():
                vector = weight.dim() < 2 or "embed" in name or "lm_head" in name
                update = UPDATES["adamw_8bit" if kind == "muon" and vector else kind]
                rate = 2e-3 if kind == "muon" and vector else RATE
                decay = 0.0 if "norm" in name else DECAY
                new = update(weight.double(), weight.grad.double(), states[name], rate, decay, step + 1)
                weight.copy_(new)
        found.append({name: weight.detach().clone() for name, weight in named.items()})
    return found


def lion(w: Tensor, g: Tensor, state: dict[str, Tensor], rate: float, decay: float, step: int) -> Tensor:
    """Chen et al. 2023 (arXiv:2302.06675), algorithm 2."""
    mean = state.get("mean", torch.zeros_like(w))
    state["mean"] = 0.99 * mean + 0.01 * g
    return w - rate * (torch.sign(0.9 * mean + 0.1 * g) + decay * w)


def adamw(w: Tensor, g: Tensor, state: dict[str, Tensor], rate: float, decay: float, step: int) -> Tensor:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2."""
    state["m"] = 0.9 * state.get("m", torch.zeros_like(w)) + 0.1 * g
    state["v"] = 0.999 * state.get("v", torch.zeros_like(w)) + 0.001 * g * g
    m, v = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.999**step)
    return w - rate * (m / (v.sqrt() + 1e-8) + decay * w)


def sgd(w: Tensor, g: Tensor, state: dict[str, Tensor], rate: float, decay: float, step: int) -> Tensor:
    """Nesterov's momentum as torch.optim.SGD documents it."""
    g = g + decay * w
    state["b"] = 0.9 * state["b"] + g if step > 1 else g
    return w - rate * (g + 0.9 * state["b"])


def muon(w: Tensor, g: Tensor, state: dict[str, Tensor], rate: float, decay: float, step: int) -> Tensor:
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon): Nesterov, then five Newton-Schulz iterations."""
    state["m"] = 0.95 * state.get("m", torch.zeros_like(w)) + 0.05 * g
    x = 0.05 * g + 0.95 * state["m"]
    x = x / x.norm(dim=(-2, -1), keepdim=True)  # of one matrix, or of each expert's
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return w * (1 - rate * decay) - rate * x * max(1.0, w.shape[-2] / w.shape[-1]) ** 0.5


UPDATES: dict[str, Callable[..., Tensor]] = {"lion": lion, "adamw_8bit": adamw, "sgd": sgd, "muon": muon}
