"""Packed and padded are the same training, and a model that cannot be packed is padded and says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dsdpo.config.data import DataConfig
from dsdpo.config.model import ModelConfig
from dsdpo.data.binning import LayoutName, MicroBatchBudget
from dsdpo.data.pairs import Pairs, open_pairs
from dsdpo.data.steps import BatchSource
from dsdpo.data.tokenize import prepare_pairs
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.objective.logps import ResponseScorer, pair_logps
from tests.ranks import RankError, run_ranks
from tests.runs import losses, settings, train_on
from tests.tiny import tiny_lm

LORA = {"lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, "gradient_checkpointing": True}
SNAPSHOT = {
    "strategy": "policy_snapshot",
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 1.0,
    "ref_model_sync_steps": 2,
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter-zero3-checkpointing": ("zero3", {"model": LORA}),
    "precomputed-zero2": ("zero2", {"reference": {"strategy": "precomputed"}}),
    "policy_snapshot-zero1": ("zero1", {"reference": SNAPSHOT}),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_strategy_trains_alike_in_both_layouts(name: str, inputs: Path, tmp_path: Path) -> None:
    """The separate reference and full fine-tuning: `test_zero_matrix.py`. Log-probs stored by one serve the other."""
    stage, sections = RUNS[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((inputs / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    found = {}
    for layout in ("padded", "packed"):
        run = settings(
            tmp_path / layout,
            inputs,
            policy_zero=stage,
            reference_zero=None,
            data={"layout": layout, "train": str(rows), "eval": str(inputs / "few.jsonl")},
            evaluation={"every_steps": 0, "at_start": False},
            batch={"pairs_per_micro_batch": None, "tokens_per_micro_batch": 100},
            **sections,
        )
        logged = train_on(2, run)
        found[layout] = [*losses(logged), logged[-1]["eval/loss"]]
    assert len(found["packed"]) == 5
    assert found["packed"] == pytest.approx(found["padded"], abs=1e-5)
    assert abs(found["packed"][0] - found["packed"][3]) > 1e-4, "nothing was learned, so nothing was compared"


@pytest.fixture(scope="module")
def held_out(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The first 150 of test.jsonl."""
    source = {"train": {"path": str(shared / "data" / "test.jsonl"), "split": "train[:150]"}, "max_length": 512}
    data = DataConfig.model_validate({**source, "cache_dir": str(tmp_path_factory.mktemp("prepared"))})
    tokenizer = load_tokenizer(ModelConfig(path=str(shared / "models" / "tiny-sft")))
    return open_pairs(prepare_pairs(data.train, tokenizer, data=data, seed=0, default_split="train"))


@pytest.mark.parametrize("family", ["tiny-sft", "llama with LoRA", "gemma2"])
def test_real_pairs(family: str, held_out: Pairs, shared: Path) -> None:
    """Log-probs and losses of 150 held-out pairs; with tokens folded into a tiny vocabulary, gradients too.

    Real lengths: a trained model, an adapter, and caps with windows. All families: `tests/objective/test_attention.py`.
    """
    trained = family == "tiny-sft"
    pairs = held_out if trained else replace(held_out, tokens=held_out.tokens % 94 + 3)
    found = {}
    for layout, attention in (("packed", "dsdpo"), ("padded", "eager" if family == "gemma2" else "sdpa")):
        lm = language_model(family, shared)
        lm.set_attn_implementation(attention)
        found[layout] = score_real_pairs(pairs, lm, layout, gradients=not trained)
    (packed, packed_gradient), (padded, padded_gradient) = found["packed"], found["padded"]
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dpo_losses(packed), dpo_losses(padded), rtol=1e-5, atol=1e-5)
    assert trained or (packed_gradient - padded_gradient).norm() < 1e-5 * padded_gradient.norm()


def language_model(family: str, shared: Path) -> Any:
    """A trained model, or a tiny random one of a family."""
    if family == "tiny-sft":
        return AutoModelForCausalLM.from_pretrained(shared / "models" / "tiny-sft", dtype=torch.float32)
    name, _, lora = family.partition(" with ")
    lm = tiny_lm(name, max_position_embeddings=512, scale=2.0)
    if lora:
        torch.manual_seed(0)
        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(lm, settings)  # puts its layers into `lm`
    return lm


def score_real_pairs(
    pairs: Pairs, lm: Any, layout: LayoutName, *, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (N, 2) by pair, and the gradient of the DPO loss over all pairs or zeros, in one process."""
    budget = MicroBatchBudget(tokens=4096)
    windows = BatchSource(pairs=pairs, budget=budget, layout=layout, pad_token_id=0, rank=0, world_size=1)
    scorer = ResponseScorer(lm)
    logps = torch.zeros(len(pairs), 2)
    for window in windows.whole_pass():
        for batch in window:
            with torch.set_grad_enabled(gradients):
                scored = pair_logps(scorer, batch)
            both = torch.stack([scored.chosen, scored.rejected], dim=1)
            if gradients:
                dpo_losses(both).sum().backward()
            logps[batch.pair_ids] = both.detach()
    found = [parameter.grad.flatten() for parameter in lm.parameters() if parameter.grad is not None]
    return logps, torch.cat(found or [torch.zeros(1)])


def dpo_losses(logps: torch.Tensor) -> torch.Tensor:
    """(N,) of log-probs (N, 2) against a reference that finds both responses equally likely."""
    return torch.nn.functional.softplus(-0.1 * (logps[:, 0] - logps[:, 1]))


def plan_here(run: dict[str, Any]) -> tuple[str, str | None]:
    """Layout of a run's plan, and why it is not packed."""
    from tests.engines import planned

    plan = planned(run)
    return plan.train.layout, plan.layout.why_padded


def test_a_model_that_cannot_be_packed(inputs: Path, tmp_path: Path) -> None:
    """BLOOM computes its attention itself: padded by itself, refused where packed is asked for; as a reference too."""
    from transformers import BloomConfig, BloomForCausalLM

    from tests.engines import save_lm

    config = BloomConfig(vocab_size=200, hidden_size=32, n_layer=1, n_head=2, pad_token_id=0)
    path = save_lm(tmp_path / "bloom", inputs / "model", BloomForCausalLM(config))
    reason = "bloom does not call its attention through transformers' interface"
    bloom = settings(tmp_path / "auto", inputs, policy_zero="zero2", reference_zero="zero0", model={"path": path})
    assert run_ranks(2, plan_here, bloom) == [("padded", reason)] * 2
    assert len(losses(train_on(2, bloom))) == 4
    reference = settings(tmp_path / "reference", inputs, reference={"path": path})
    assert run_ranks(2, plan_here, reference) == [("padded", reason)] * 2
    asked = settings(tmp_path / "asked", inputs, data={"layout": "packed"}, reference={"path": path})
    with pytest.raises(
        RankError, match=r"data.layout: packed, but bloom does not .* \(reference.path\); set data.layout"
    ):
        run_ranks(2, plan_here, asked)
    assert run_ranks(2, plan_here, settings(tmp_path / "demo", inputs)) == [("packed", None)] * 2


def check_with_one_wrong_rank(run: dict[str, Any]) -> str:
    """What `check_engine` says on each rank when rank 1's attention lets all pairs of a row see each other."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from dsdpo.distributed import rank
    from dsdpo.engine.build import device, warm_up
    from dsdpo.engine.self_check import check_engine
    from dsdpo.errors import ConfigError
    from dsdpo.objective.attention import attention
    from tests.engines import planned, policy_of

    def leaky(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
        mask = None if others.pop("packed", None) is not None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **others)

    plan = planned(run)
    policy = policy_of(plan)
    warm_up(policy, plan.train.largest_batch(device()))
    check_engine(policy, plan.train, dtype="float32", key="model.path", trains=True)
    assert policy.module.training
    AttentionInterface.register("dsdpo", leaky if rank() == 1 else attention)
    try:
        check_engine(policy, plan.train, dtype="float32", key="model.path", trains=True)
    except ConfigError as error:
        return str(error)
    finally:
        AttentionInterface.register("dsdpo", attention)
    return "nothing"


def test_a_difference_on_one_rank_stops_all(inputs: Path, tmp_path: Path) -> None:
    for said in run_ranks(2, check_with_one_wrong_rank, settings(tmp_path, inputs)):
        assert said.startswith("model.path: LlamaForCausalLM gives a response of")
        assert "set data.layout to padded" in said
