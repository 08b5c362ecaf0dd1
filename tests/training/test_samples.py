"""Samples: what the models answer to fixed prompts, on any ranks and with any gathering, leaving training as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from dsdpo.objective.decode import Decoding, TokenChoice
from tests.gathers import counting
from tests.ranks import run_ranks
from tests.runs import metrics, settings, train_here, train_on
from tests.tiny import tiny_lm

QUESTIONS = ["what colour is the sun ?", "what colour is grass ?", "what colour is snow ?"]
TOKENS = 12


@pytest.fixture(scope="module")
def prompts(inputs: Path) -> Path:
    path = inputs / "prompts.txt"
    path.write_text("\n".join(QUESTIONS) + "\n\n")
    return path


def sampled(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]


def count_gathers(run: dict[str, Any]) -> int:
    """Parameters that this rank has gathered in a whole run."""
    with counting() as events:
        train_here(run)
    return events["gathered"]


def test_samples_are_the_models_own_answers_and_change_nothing(inputs: Path, prompts: Path, tmp_path: Path) -> None:
    """ZeRO-3 on two ranks: three prompts, so that one rank has fewer; whole weights and layer by layer."""
    runs = {
        name: settings(
            tmp_path / name,
            inputs,
            train={"max_steps": 2},
            evaluation={"every_steps": 2, "at_start": True, **({"samples": samples} if samples else {})},
            loss={"type": "aot"},  # whose pass ahead has a record of gathers of its own
            optimizer={"learning_rate": 3e-2},  # so that the answers change
        )
        for name, samples in {
            "none": None,
            "whole": {"prompts": str(prompts), "max_new_tokens": TOKENS, "gather": "whole"},
            "layers": {"prompts": str(prompts), "max_new_tokens": TOKENS, "gather": "layers"},
        }.items()
    }
    gathers = {name: run_ranks(2, count_gathers, run) for name, run in runs.items()}
    assert all(len(set(of_ranks)) == 1 for of_ranks in gathers.values()), "ranks made other passes"
    assert gathers["whole"][0] < gathers["layers"][0]
    trained = {name: [row for row in metrics(tmp_path / name / "run") if "loss" in row] for name in runs}
    for name in ("whole", "layers"):
        for row, plain in zip(trained[name], trained["none"], strict=True):
            assert row["comm/gathers"] == plain["comm/gathers"], "training's record of gathers was disturbed"
    weights = {name: load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in runs}
    rows = {name: sampled(tmp_path / name) for name in ("whole", "layers")}
    for name in rows:
        assert weights[name].keys() == weights["none"].keys()
        assert all(torch.equal(weights[name][key], weights["none"][key]) for key in weights["none"]), name
    assert rows["whole"] == rows["layers"]
    assert [row["step"] for row in rows["whole"]] == [0] * 3 + [2] * 3
    for folder, name, part in (
        (inputs / "model", "policy", rows["whole"][:3]),
        (inputs / "model", "reference", rows["whole"][3:]),
        (tmp_path / "whole" / "run" / "model", "policy", rows["whole"][3:]),
    ):
        for row, (prompt, answer, ended) in zip(part, map(greedy(folder), QUESTIONS), strict=True):
            assert (row["prompt"], row[name], row[f"{name}_ended"]) == (prompt, answer, ended)
            assert row[f"{name}_tokens"] <= TOKENS
    assert [row["policy"] for row in rows["whole"][:3]] != [row["policy"] for row in rows["whole"][3:]]


def test_other_strategies_and_ranks_give_the_same_answers(inputs: Path, prompts: Path, tmp_path: Path) -> None:
    """One prompt for two ranks; a run that goes on drops rows of steps that it takes again."""
    found = {}
    for name, ranks, sections in (
        ("separate", 1, {}),
        ("adapter", 2, {"model": {"lora": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}}}),
        ("precomputed", 1, {"reference": {"strategy": "precomputed"}}),
    ):
        alone: dict[str, Any] = {"policy_zero": "zero1", "reference_zero": "zero0"} if ranks == 1 else {}
        gather = {} if alone else {"gather": "layers"}  # one rank has nothing to gather
        evaluation = {
            "every_steps": 0, "samples": {"prompts": str(prompts), "n": 1, "max_new_tokens": TOKENS, **gather}
        }  # fmt: skip
        common = {"evaluation": evaluation, "train": {"max_steps": 1}}
        train_on(ranks, settings(tmp_path / name, inputs, **common, **alone, **sections))
        found[name] = sampled(tmp_path / name)
        assert [row["step"] for row in found[name]] == [0, 1]
    [separate, adapter, precomputed] = found.values()
    assert separate[0]["policy"] == separate[0]["reference"] == separate[1]["reference"] == adapter[0]["reference"]
    assert [row["policy"] for row in precomputed] == [row["policy"] for row in separate]
    assert adapter[0]["policy"] != adapter[0]["reference"] == adapter[1]["reference"]
    assert "reference" not in precomputed[0]


def test_drawn_tokens_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    shares = torch.softmax(logits[0] / 2.0, -1)
    drawn = TokenChoice(range(4000), temperature=2.0, top_p=1.0, seed=1)(logits)
    assert torch.bincount(drawn, minlength=3) / 4000 == pytest.approx(shares, abs=0.03)
    # 2 has 0.506 and 1 has 0.307 at temperature 2: the first alone does not reach 0.6.
    cut = TokenChoice(range(4000), temperature=2.0, top_p=0.6, seed=1)(logits)
    assert torch.bincount(cut, minlength=3)[0] == 0
    assert (cut == 1).double().mean() == pytest.approx(float(shares[1] / shares[1:].sum()), abs=0.03)
    again = TokenChoice([7, 3], temperature=2.0, top_p=1.0, seed=1)
    assert again(logits[:2]).tolist() == drawn[[7, 3]].tolist(), "other prompts have a part in a prompt's stream"
    assert TokenChoice([0], temperature=0.0, top_p=1.0, seed=1)(logits[:1]).tolist() == [2]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", "bloom"])
def test_decoding_is_as_transformers_has_it(family: str) -> None:
    """Prompts of three lengths at once, as each alone; sliding windows, experts, learned positions and ALiBi."""
    lm = bloom() if family == "bloom" else tiny_lm(family, scale=2.0)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    decoding = Decoding(prompts, pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        for _ in range(TOKENS):
            decoding.append(decoding.next_logits(lm).argmax(-1))
        for prompt, row in zip(prompts, decoding.ids[:, -TOKENS:].tolist(), strict=True):
            ids = list(prompt)
            for _ in range(TOKENS):  # no cache, no padding
                ids.append(int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert row == ids[-TOKENS:]
    assert decoding.cache is not None


def bloom() -> Any:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0)
    lm = BloomForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(5.0)
    return lm


def greedy(folder: Path) -> Any:
    """transformers' own greedy answer to a question, alone: the prompt, the answer, and whether it came to an end."""
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def answer(question: str) -> tuple[str, str, bool]:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        written = lm.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        ended = tokenizer.eos_token_id in written.tolist()
        return tokenizer.decode(ids[0]), tokenizer.decode(written, skip_special_tokens=True), ended

    return answer
