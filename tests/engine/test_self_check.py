"""The look at the truth before training: what it refuses, on all ranks, and that it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.engines import planned, policy_of, reference_of
from tests.gathers import counting
from tests.ranks import run_ranks
from tests.runs import settings


def refusals(run: dict[str, Any]) -> dict[str, str]:
    """What is said of a policy that is right, and of one spoilt on rank 1 in several ways."""
    from dsdpo.distributed import rank
    from dsdpo.engine.build import device, warm_up
    from dsdpo.engine.self_check import check_engine, check_same
    from dsdpo.errors import ConfigError
    from dsdpo.objective.output_head import LogitTransform

    plan = planned(run)
    policy = policy_of(plan)
    warm_up(policy, plan.train.largest_batch(device()))

    def said(check: Any) -> str:
        try:
            check()
        except ConfigError as error:
            return str(error)
        return "nothing"

    def look() -> Any:
        return check_engine(policy, plan.train, dtype="float32", key="model.path", trains=True)

    found = {"right": said(look)}
    answers = look()
    assert policy.module.training
    head, layer = policy.module.lm.get_output_embeddings(), policy.module.lm.model.layers[0]
    if rank() == 1:
        vars(head)["transform"] = LogitTransform(scale=1.5)
    found["scale"] = said(look)
    vars(head)["transform"] = LogitTransform()

    def noise(module: Any, arguments: Any, output: Any) -> Any:
        drawn = torch.randn_like(output) if module.training and rank() == 1 else torch.zeros_like(output)
        return output + 0.3 * drawn

    handle = layer.register_forward_hook(noise)
    found["noise"] = said(look)
    handle.remove()
    found["again"] = said(look)
    other = replace(answers, logps=answers.logps - 1.0 * rank(), name="reference.path: Other")
    found["same"] = said(lambda: check_same(answers, other))
    return found


def test_each_refusal_names_model_quantity_and_numbers_on_all_ranks(inputs: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, refusals, settings(tmp_path, inputs))
    assert first == second
    assert first["right"] == first["again"] == "nothing"
    assert first["scale"].startswith("model.path: LlamaForCausalLM: ")
    assert "from the model's own logits" in first["scale"]
    assert "in training mode: it draws at random" in first["noise"]
    assert "the reference has the weights that the policy starts from, but gives a response of" in first["same"]


def test_long_pairs_are_cut() -> None:
    import numpy as np

    from dsdpo.data.pairs import Group
    from dsdpo.data.steps import shortened

    group = Group.of(0, np.arange(5000), np.arange(3000), np.arange(7))
    cut = shortened(group, 1024)
    assert cut.prompt.tolist() == list(range(4488, 5000))
    assert [len(response) for response in cut.responses] == [512, 7]
    short = shortened(Group.of(0, np.arange(10), np.arange(3000)), 1024)
    assert (len(short.prompt), len(short.responses[0])) == (10, 1014)


def prefetching(run: dict[str, Any]) -> list[tuple[bool, int]]:
    """Of policy and reference after the look: is the record of gathers whole, and gathers of one more pass."""
    from dsdpo.engine.build import device, warm_up
    from dsdpo.engine.quirks.gather_trace import _zero3_offload
    from dsdpo.engine.self_check import check_engine

    plan = planned(run)
    policy, reference = policy_of(plan), reference_of(plan)
    batch = plan.train.largest_batch(device())
    warm_up(policy, batch)
    found = []
    for engine in (policy, reference):
        check_engine(engine, plan.train, dtype="float32", key="model.path", trains=engine is policy)
        for _ in range(2):
            with torch.set_grad_enabled(engine is policy), counting() as events:
                answer = engine(batch=batch)
                if engine is policy:
                    engine.backward(answer.sum() * 0.0, scale_wrt_gas=False)
        found.append((_zero3_offload(engine).param_coordinator.is_invalid_trace(), events["gathered"]))
    return found


def test_self_check_keeps_the_gather_trace(inputs: Path, tmp_path: Path) -> None:
    for (policy_spoilt, _), (reference_spoilt, _) in run_ranks(2, prefetching, settings(tmp_path, inputs)):
        assert not policy_spoilt
        assert not reference_spoilt
