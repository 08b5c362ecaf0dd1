"""Compiled decoder layers give the losses and gradients of those that are not, and are compiled once for all lengths.

With torch's `aot_eager` backend, which is all of the compiler but its generated code; `inductor` has a nightly test and
those of tests/gpu.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dsdpo.config.model import ModelConfig
from dsdpo.data.batch import collate_padded
from dsdpo.data.packed_layout import collate_packed
from dsdpo.engine import compiled_layers
from dsdpo.engine.compiled_layers import compile_layers, compiler_refusal, layers_of
from dsdpo.errors import ConfigError
from dsdpo.objective.decode import Decoding
from dsdpo.objective.logps import ResponseScorer
from tests.engines import planned, policy_of
from tests.ranks import restart, run_ranks
from tests.runs import metrics, settings, train_here
from tests.tiny import random_pairs, tiny_lm


def compiled_graphs() -> int:
    """How many pieces of code torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def made(family: str, layout: str, *, compiled: bool, checkpointing: bool, on_host: bool = False) -> ResponseScorer:
    lm = tiny_lm(family, num_hidden_layers=3, scale=2.0).train()
    lm.set_attn_implementation("dsdpo" if layout == "packed" else "sdpa")
    if compiled:
        compile_layers(lm)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return ResponseScorer(lm, activations_on_host=on_host)


def scored(scorer: ResponseScorer, layout: str, *, seed: int) -> list[Tensor]:
    """Log-probs, gradients, and log-probs in a pass without gradient, of pairs whose lengths follow from the seed."""
    pairs = random_pairs(2 + seed % 3, seed=seed, longest=10 + 17 * seed)
    batch = collate_packed(pairs) if layout == "packed" else collate_padded(pairs, pad_token_id=0)
    scorer.zero_grad()
    sums = scorer(batch)
    (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
    with torch.no_grad():
        again = scorer(batch)
    return [sums.detach(), torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None]), again]


@pytest.mark.parametrize(
    ("family", "layout", "checkpointing", "on_host"),
    [
        ("llama", "packed", True, True),
        pytest.param("mixtral", "padded", False, False, marks=pytest.mark.nightly),
    ],
)
def test_numbers_of_eager_layers_from_few_graphs(
    family: str, layout: str, checkpointing: bool, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    options: dict[str, Any] = {"checkpointing": checkpointing, "on_host": on_host}
    eager, compiled = (made(family, layout, compiled=which, **options) for which in (False, True))
    before, graphs = compiled_graphs(), []
    for seed in range(5):
        for ours, truth in zip(scored(compiled, layout, seed=seed), scored(eager, layout, seed=seed), strict=True):
            assert (ours - truth).norm() < 1e-5 * truth.norm()
        graphs.append(compiled_graphs() - before)
    assert 0 < graphs[1] <= 12, "one for each piece of a layer and kind of pass, whatever the layer"
    assert graphs[1:] == [graphs[1]] * 4, "other lengths and numbers of pairs compile nothing"


def test_samples_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    eager, compiled = (made("llama", "packed", compiled=which, checkpointing=False) for which in (False, True))
    before = compiled_graphs()
    answers = []
    for scorer in (eager.eval(), compiled.eval()):
        decoding = Decoding([[5, 6, 7], [8]], pad_id=0, device=torch.device("cpu"))
        with torch.no_grad():
            first = scorer(decoding=decoding)
            decoding.append(first.argmax(-1))
            answers.append(scorer(decoding=decoding))
    assert torch.equal(*answers)
    assert compiled_graphs() == before


def one_step(run: dict[str, Any], compiled: bool) -> tuple[list[list[float]], list[Tensor], int]:
    """Of a policy under ZeRO: margins of two batches, the gradients of the second, and how much was compiled."""
    from deepspeed.utils import safe_get_full_grad

    from dsdpo.engine.build import device
    from dsdpo.objective.logps import pair_logps

    compiled_layers.BACKEND = "aot_eager"
    run["model"]["torch_compile"] = compiled
    before = compiled_graphs()
    policy = policy_of(planned(run))
    margins = []
    for seed in (1, 2):
        batch = collate_packed(random_pairs(3, seed=seed, vocab=30, longest=9 * seed)).to(device())
        logps = pair_logps(policy, batch)
        margin = logps.chosen - logps.rejected
        policy.backward(margin.mean(), scale_wrt_gas=False)
        margins.append(margin.tolist())
    parameters = [parameter for parameter in policy.module.parameters() if parameter.requires_grad]
    return margins, [safe_get_full_grad(parameter) for parameter in parameters], compiled_graphs() - before


def test_gathered_weights_reach_compiled_layers(inputs: Path, tmp_path: Path) -> None:
    """ZeRO-3 on two ranks: nothing is whole outside of a layer's own pass, forward and backward."""
    run = settings(tmp_path, inputs, model={"gradient_checkpointing": True}, reference={"strategy": "precomputed"})
    for (margins, gradients, graphs), (truth, true_gradients, none) in zip(
        run_ranks(2, one_step, run, True), run_ranks(2, one_step, run, False), strict=True
    ):
        assert np.allclose(margins, truth, rtol=1e-5, atol=1e-5)
        assert len(gradients) == len(true_gradients) > 10
        for ours, exact in zip(gradients, true_gradients, strict=True):
            assert (ours - exact).norm() <= 1e-5 * exact.norm()
        assert 0 < graphs <= 8
        assert none == 0


def train_compiled(run: dict[str, Any]) -> int:
    """Train in a rank of the pool; the number of graphs."""
    compiled_layers.BACKEND = "aot_eager"
    before = compiled_graphs()
    train_here(run)
    return compiled_graphs() - before


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("zero", "reference_zero"),
    [
        ("zero3", "zero3"),
        ("zero3_offload", "zero3_offload"),
        ("zero2", "zero0"),
    ],
)
def test_runs_of_two_ranks(zero: str, reference_zero: str, inputs: Path, tmp_path: Path) -> None:
    """Whole runs, with a reference in an engine of its own."""
    zeros: dict[str, Any] = {"policy_zero": zero, "reference_zero": reference_zero}
    runs = [
        settings(tmp_path / f"{which}", inputs, model={"torch_compile": which, "gradient_checkpointing": True}, **zeros)
        for which in (False, True)
    ]
    run_ranks(2, train_here, runs[0])
    restart(2)  # what is compiled stays with a process
    graphs = run_ranks(2, train_compiled, runs[1])
    plain, compiled = (
        [(row["loss"], row["grad_norm"]) for row in metrics(Path(run["output_dir"])) if "loss" in row] for run in runs
    )
    assert len(plain) == 4
    for ours, truth in zip(compiled, plain, strict=True):
        assert ours == pytest.approx(truth, rel=1e-5)
    assert all(0 < number <= 32 for number in graphs), graphs  # 28 under ZeRO-3, in two engines


@pytest.mark.nightly
def test_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the code that inductor writes for this CPU and has its compiler build."""
    if (refusal := compiler_refusal("cpu")) is not None:
        pytest.skip(refusal)
    eager, compiled = (made("llama", "packed", compiled=which, checkpointing=True) for which in (False, True))
    for seed in range(3):
        for ours, truth in zip(scored(compiled, "packed", seed=seed), scored(eager, "packed", seed=seed), strict=True):
            assert (ours - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_checkpointing": False}, "needs model.gradient_checkpointing"),
        ({"lora": {"r": 4}}, "model.torch_compile and model.lora do not go together"),
        ({"mlp_tile_tokens": 64}, "model.torch_compile and model.mlp_tile_tokens do not go together"),
        ({"use_liger_kernel": True}, "do the same twice"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig(path="model", torch_compile=True, **options)


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.torch_compile: Linear has no layers"):
        layers_of(nn.Linear(2, 2))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiler_refusal("cpu") == "needs a C++ compiler, and g++ is not there: install g++"
    monkeypatch.setattr(compiled_layers, "find_spec", lambda name: None)
    assert "pip install triton" in str(compiler_refusal("cuda"))
