"""The two engines: what they hold, and that nothing but training changes what the policy answers."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.engines import logps_here, planned, policy_of, reference_of, save_lm, train_steps
from tests.ranks import run_ranks
from tests.runs import settings
from tests.tiny import random_batch, random_pairs, tiny_lm

PAIRS = random_pairs(4, seed=5)


def test_mixture_of_experts_under_zero3(inputs: Path, tmp_path: Path) -> None:
    """Ranks see other tokens, so other experts: gathered expert by expert they would wait for each other for ever."""
    model = save_lm(tmp_path / "start", inputs / "model", tiny_lm("mixtral", scale=3.0))
    margins = {}
    for stage in ("zero1", "zero3"):
        run = settings(tmp_path / stage, inputs, policy_zero=stage, reference_zero=None, model={"path": model})
        found = run_ranks(2, train_mixture, run)
        assert all(leaves for _, leaves in found)
        margins[stage] = [margins for margins, _ in found]
    assert margins["zero3"][0] != margins["zero3"][1], "both ranks saw the same tokens"
    for rank in (0, 1):
        assert margins["zero3"][rank] == pytest.approx(margins["zero1"][rank], rel=1e-4, abs=1e-4)


def train_mixture(run: dict[str, Any]) -> tuple[list[float], bool]:
    policy = policy_of(planned(run))
    leaves = [module for module in policy.module.modules() if getattr(module, "_z3_leaf", False)]
    batches = [random_batch(3, seed=10 * dist.get_rank() + step) for step in range(4)]
    return train_steps(policy, batches), bool(leaves)


def test_dropout_is_off_in_both_engines(inputs: Path, tmp_path: Path) -> None:
    lm = tiny_lm(attention_dropout=0.5)
    model = save_lm(tmp_path / "start", inputs / "model", lm)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert not torch.equal(lm.train()(ids).logits, lm(ids).logits), "no dropout in this model to turn off"
    run = settings(tmp_path, inputs, model={"path": model, "attn_implementation": "eager"})
    for policy, again, reference in run_ranks(2, score_twice, run):
        assert policy == again
        assert policy == pytest.approx(reference, abs=1e-4)


def score_twice(run: dict[str, Any]) -> list[list[float]]:
    plan = planned(run)
    policy, reference = policy_of(plan), reference_of(plan)
    assert policy.module.training
    return [[*chain(*logps_here(engine, PAIRS))] for engine in (policy, policy, reference)]


@pytest.mark.parametrize(("policy", "reference"), [("zero2", "zero3"), ("zero3", "zero0"), ("zero1", "zero3_offload")])
def test_each_engine_is_loaded_for_its_own_stage(policy: str, reference: str, inputs: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, inputs, policy_zero=policy, reference_zero=reference)
    for partitioned in run_ranks(2, partitioned_here, run):
        assert partitioned == [policy.startswith("zero3"), reference.startswith("zero3")] * 2


def partitioned_here(run: dict[str, Any]) -> list[bool]:
    """Whether policy and reference hold shards; built in one order, then in the other."""
    from dsdpo.engine.shards import is_partitioned

    plan = planned(run)
    engines = [policy_of(plan), reference_of(plan)]
    engines += reversed([reference_of(plan), policy_of(plan)])
    found = []
    for engine in engines:
        kinds = {is_partitioned(parameter) for parameter in engine.module.parameters()}
        assert len(kinds) == 1
        whole = {parameter.numel() > 0 for parameter in engine.module.parameters()}
        assert whole == {not kinds.copy().pop()}
        found += kinds
    return found


def test_bf16_shards_answer_as_a_plain_load_does(inputs: Path, tmp_path: Path) -> None:
    """RoPE's frequencies stay float32; rounded to bf16 they would turn every position by a little."""
    run = settings(tmp_path, inputs, reference_zero="zero3", model={"dtype": "bfloat16"})
    for dtypes, engine, plain in run_ranks(2, score_in_bf16, run):
        assert dtypes == {"torch.float32"}
        assert engine == plain


def score_in_bf16(run: dict[str, Any]) -> tuple[set[str], list[list[float]], list[list[float]]]:
    from transformers import AutoModelForCausalLM

    from dsdpo.objective.logps import ResponseScorer

    pairs = random_pairs(4, vocab=60, seed=6)
    reference = reference_of(planned(run))
    dtypes = {str(buffer.dtype) for name, buffer in reference.module.named_buffers() if "inv_freq" in name}
    plain = AutoModelForCausalLM.from_pretrained(run["model"]["path"], dtype=torch.bfloat16).eval()
    return dtypes, logps_here(reference, pairs), logps_here(ResponseScorer(plain), pairs)


def test_reference_only_answers(inputs: Path, tmp_path: Path) -> None:
    for facts in run_ranks(2, reference_facts, settings(tmp_path, inputs)):
        assert facts == {"trainable": 0, "optimizer states": 0, "with gradient": 0, "output in graph": False}


def reference_facts(run: dict[str, Any]) -> dict[str, Any]:
    reference = reference_of(planned(run))
    output = reference(batch=random_batch(2, vocab=60))
    parameters = list(reference.module.parameters())
    return {
        "trainable": sum(parameter.requires_grad for parameter in parameters),
        "optimizer states": len(getattr(getattr(reference.optimizer, "optimizer", None), "state", {})),
        "with gradient": sum(parameter.grad is not None for parameter in parameters),
        "output in graph": output.requires_grad,
    }


def test_window_costs_one_gather_however_many_micro_batches(inputs: Path, tmp_path: Path) -> None:
    for parameters, gathers in run_ranks(2, count_gathers, settings(tmp_path, inputs)):
        assert gathers == {1: parameters, 6: parameters}


def count_gathers(run: dict[str, Any]) -> tuple[int, dict[int, int]]:
    """The number of parameters of all modules, and how many were made whole for windows of 1 and of 6 micro-batches."""
    from dsdpo.reference.base import score_batches
    from tests.gathers import counting

    reference = reference_of(planned(run))
    gathers = {}
    for micro_batches in (1, 6):
        window = [random_batch(2, vocab=60, seed=seed) for seed in range(micro_batches)]
        with counting() as events:
            scored = score_batches(reference, window, score_tokens=100_000)
        assert len(scored) == micro_batches
        gathers[micro_batches] = events["gathered"]
    # Tied weights count twice: the first and the last module need them.
    return len(list(reference.module.named_parameters(remove_duplicate=False))), gathers


def test_weights_are_read_from_a_pickle_only_where_that_is_allowed(tmp_path: Path) -> None:
    from dsdpo.config.model import ModelConfig
    from dsdpo.engine.load import load_lm
    from dsdpo.errors import ConfigError

    lm = tiny_lm()
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    model = ModelConfig(path=str(tmp_path), dtype="float32")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_lm(model, {}, layout="padded")
    loaded = load_lm(model.model_copy(update={"allow_pickle": True}), {}, layout="padded")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in lm.state_dict().items())
