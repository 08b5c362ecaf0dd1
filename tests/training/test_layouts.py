"""Packed and padded are the same training, and a model that cannot be packed is padded and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankError, run_ranks
from tests.runs import demo_inputs, losses, settings, train_on


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_inputs(tmp_path_factory.mktemp("inputs"))


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
            data={"layout": layout, "train": str(rows), "eval": str(rows)},
            evaluation={"every_steps": 0, "at_start": False},
            batch={"pairs_per_micro_batch": None, "tokens_per_micro_batch": 100},
            **sections,
        )
        logged = train_on(2, run)
        found[layout] = [*losses(logged), logged[-1]["eval/loss"]]
    assert len(found["packed"]) == 5
    assert found["packed"] == pytest.approx(found["padded"], abs=1e-5)
    assert abs(found["packed"][0] - found["packed"][3]) > 1e-4, "nothing was learned, so nothing was compared"


def test_real_pairs(shared: Path, tmp_path: Path) -> None:
    """All 500 held-out pairs: log-probs within 1e-5, and the gradient of every tenth pair."""
    packed, padded = (score_real_pairs(shared, tmp_path, layout) for layout in ("packed", "padded"))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-4)
    assert (packed[1] - padded[1]).norm() < 1e-5 * padded[1].norm()


def score_real_pairs(shared: Path, folder: Path, layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (500, 2) by pair, and the gradient of the DPO loss over every tenth, in one process."""
    from transformers import AutoModelForCausalLM

    from dsdpo.config.run import RunConfig
    from dsdpo.data.packing import MicroBatchBudget
    from dsdpo.data.pairs import open_pairs
    from dsdpo.data.tokenize import prepare_pairs
    from dsdpo.data.tokenizer import load_tokenizer
    from dsdpo.data.window import Windows
    from dsdpo.objective.logps import ResponseScorer, pair_logps

    run = RunConfig.model_validate(
        {
            "model": {"path": str(shared / "models" / "tiny-sft")},
            "data": {"train": str(shared / "data" / "test.jsonl"), "max_length": 512, "cache_dir": str(folder)},
            "deepspeed": "none.json",
            "output_dir": str(folder),
        }
    )
    tokenizer = load_tokenizer(run.model)
    prepared = prepare_pairs(run.data.train, tokenizer, data=run.data, seed=0, default_split="train")
    windows = Windows(
        pairs=open_pairs(prepared),
        budget=MicroBatchBudget(tokens=4096),
        layout=layout,
        pad_token_id=tokenizer.pad_token_id,
        rank=0,
        world_size=1,
    )
    lm = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32)
    lm.set_attn_implementation("dsdpo" if layout == "packed" else "sdpa")
    scorer = ResponseScorer(lm)
    logps = torch.zeros(len(windows.pairs), 2)
    with torch.no_grad():
        for window in windows.whole_pass():
            for batch in window:
                scored = pair_logps(scorer, batch)
                logps[batch.pair_ids] = torch.stack([scored.chosen, scored.rejected], dim=1)
    for first in range(0, len(windows.pairs), 100):
        scored = pair_logps(scorer, windows.batch(tuple(range(first, first + 100, 10))))
        torch.nn.functional.softplus(-0.1 * (scored.chosen - scored.rejected)).sum().backward()
    return logps, torch.cat([parameter.grad.flatten() for parameter in lm.parameters()])


def plan_here(run: dict[str, Any]) -> tuple[str, str | None]:
    """Layout of a run's plan, and why it is not packed."""
    from tests.engines import planned

    plan = planned(run)
    return plan.train.layout, plan.why_padded


def test_a_model_that_cannot_be_packed(inputs: Path, tmp_path: Path) -> None:
    """GPT-J computes its attention itself: padded by itself, refused where packed is asked for; as a reference too."""
    from transformers import GPTJConfig, GPTJForCausalLM

    from tests.engines import save_lm

    config = GPTJConfig(vocab_size=200, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64, pad_token_id=0)
    path = save_lm(tmp_path / "gptj", inputs / "model", GPTJForCausalLM(config))
    reason = "gptj does not call its attention through transformers' interface"
    gptj = settings(tmp_path / "auto", inputs, policy_zero="zero2", reference_zero="zero0", model={"path": path})
    assert run_ranks(2, plan_here, gptj) == [("padded", reason)] * 2
    assert len(losses(train_on(2, gptj))) == 4
    reference = settings(tmp_path / "reference", inputs, reference={"path": path})
    assert run_ranks(2, plan_here, reference) == [("padded", reason)] * 2
    asked = settings(tmp_path / "asked", inputs, data={"layout": "packed"}, reference={"path": path})
    with pytest.raises(
        RankError, match=r"data.layout: packed, but gptj does not .* \(reference.path\); set data.layout"
    ):
        run_ranks(2, plan_here, asked)
    assert run_ranks(2, plan_here, settings(tmp_path / "demo", inputs)) == [("packed", None)] * 2


def check_with_one_wrong_rank(run: dict[str, Any]) -> str:
    """What `check_layout` says on each rank when rank 1's attention lets all pairs of a row see each other."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from dsdpo.distributed import rank
    from dsdpo.engine.build import device, warm_up
    from dsdpo.engine.check import check_layout
    from dsdpo.errors import ConfigError
    from dsdpo.objective.attention import attention
    from tests.engines import planned, policy_of

    def leaky(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
        mask = None if others.pop("packed", None) is not None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **others)

    plan = planned(run)
    policy = policy_of(plan)
    warm_up(policy, plan.train.largest_batch(device()))
    check_layout(policy, plan.train, dtype="float32")
    assert policy.module.training
    AttentionInterface.register("dsdpo", leaky if rank() == 1 else attention)
    try:
        check_layout(policy, plan.train, dtype="float32")
    except ConfigError as error:
        return str(error)
    finally:
        AttentionInterface.register("dsdpo", attention)
    return "nothing"


def test_a_difference_on_one_rank_stops_all(inputs: Path, tmp_path: Path) -> None:
    for said in run_ranks(2, check_with_one_wrong_rank, settings(tmp_path, inputs)):
        assert said.startswith("data.layout: LlamaForCausalLM gives a response of")
        assert "set data.layout to padded" in said
