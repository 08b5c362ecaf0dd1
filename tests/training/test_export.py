"""The exported folder holds what was trained, whole, from every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import logps_here, planned, policy_of, save_lm, train_steps
from tests.ranks import run_ranks
from tests.runs import settings
from tests.tiny import plain_logps, random_batch, random_pairs, tiny_lm

PAIRS = random_pairs(5, seed=3)


# Whether weights are in parts is a matter of stage 3, which meets both.
@pytest.mark.parametrize(
    ("stage", "tied"),
    [("zero1", True), ("zero2", False), ("zero3", True), ("zero3", False), ("zero3_offload", True)],
)
def test_exported_model_is_the_live_policy(stage: str, tied: bool, inputs: Path, tmp_path: Path) -> None:
    model = save_lm(tmp_path / "start", inputs / "model", tiny_lm(tie_word_embeddings=tied, scale=3.0))
    run = settings(tmp_path, inputs, policy_zero=stage, reference_zero=None, model={"path": model})
    live = run_ranks(2, export_here, run, str(tmp_path / "exported"))

    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    with torch.no_grad():
        found = torch.stack(plain_logps(exported, PAIRS))
        before = torch.stack(plain_logps(AutoModelForCausalLM.from_pretrained(model), PAIRS))
    assert (found - before).abs().max() > 0.1, "nothing was trained"
    for logps in live:
        torch.testing.assert_close(found, torch.tensor(logps), rtol=1e-5, atol=1e-5)


def export_here(run: dict[str, Any], folder: str) -> list[list[float]]:
    from dsdpo.training.export import export_model

    plan = planned(run)
    policy = policy_of(plan)
    train_steps(policy, [random_batch(4, seed=seed) for seed in range(3)])
    export_model(policy, plan.tokenizer, plan.run, Path(folder), metrics={})
    policy.eval()
    return logps_here(policy, PAIRS)


def test_weights_are_gathered_in_small_groups(inputs: Path, tmp_path: Path) -> None:
    budget = 20_000
    run = settings(tmp_path, inputs, reference_zero=None)
    keeper, other = run_ranks(2, gather_here, run, budget)
    sizes, largest_parameter, same = keeper
    assert max(sizes) <= max(budget, largest_parameter)
    assert sum(sizes) > 3 * budget, "the model fits the budget, so nothing was split"
    assert same
    assert other is None, "a rank that keeps nothing got weights"


def gather_here(run: dict[str, Any], budget: int) -> tuple[list[int], int, bool] | None:
    """Bytes of each group, bytes of the largest parameter, and whether small groups give what one large group does."""
    import torch.distributed as dist

    from dsdpo.engine.shards import full_numel, gather_groups, whole_state_dict

    lm = policy_of(planned(run)).module.lm
    keep = dist.get_rank() == 0
    in_one = whole_state_dict(lm, keep=keep)
    in_many = whole_state_dict(lm, keep=keep, budget_bytes=budget)
    if in_one is None or in_many is None:
        return None
    groups = [
        sum(full_numel(parameter) * parameter.element_size() for _, parameter in group)
        for group in gather_groups(lm, budget_bytes=budget)
    ]
    largest = max(full_numel(parameter) * parameter.element_size() for parameter in lm.parameters())
    same = in_one.keys() == in_many.keys() and all(torch.equal(in_one[name], in_many[name]) for name in in_one)
    return groups, largest, same
