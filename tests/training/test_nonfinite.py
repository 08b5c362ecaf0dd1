"""A loss or gradient that is not finite: the step is not taken, said, and either the end or left out."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from dsdpo.objective.losses import LossOutput
from dsdpo.run.summary import describe_results
from dsdpo.training.nonfinite import marked
from tests.engines import planned, policy_of
from tests.ranks import run_ranks
from tests.runs import CPU, POLICIES, metrics, settings, train_here, write_json
from tests.tiny import random_batch

ZERO2_OFFLOAD = {
    "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 10000, "offload_optimizer": CPU}
}
FLOAT32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}  # at stage 1, another optimizer of DeepSpeed's
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("float32", POLICIES["zero1"]),
    "zero2": ("float32", POLICIES["zero2"]),
    "zero3": ("float32", POLICIES["zero3"]),
    "zero2_offload": ("float32", ZERO2_OFFLOAD),
    "zero3_offload": ("float32", POLICIES["zero3_offload"]),
    "zero1-bf16-fp32-gradients": ("bfloat16", {**POLICIES["zero1"], **FLOAT32_GRADIENTS}),
    "zero2-bf16": ("bfloat16", POLICIES["zero2"]),
    "zero3-bf16": ("bfloat16", POLICIES["zero3"]),
}


def test_weights_and_optimizer_states_stay_as_they_are(inputs: Path, tmp_path: Path) -> None:
    """In every stage and precision: a step with a NaN on one rank leaves no trace in what is trained after it."""
    runs = {}
    for name, (dtype, config) in CASES.items():
        run = settings(
            tmp_path / name, inputs, reference_zero=None, model={"dtype": dtype}, optimizer={"learning_rate": 0.01}
        )
        runs[name] = {**run, "deepspeed": write_json(tmp_path / name / "policy.json", config)}
    for outcomes in run_ranks(2, with_and_without_a_bad_step, runs):
        for name, (taken, unmoved, same, moved) in outcomes.items():
            assert taken == [True, False, False, True], name
            assert unmoved, f"{name}: a bad step changed the weights"
            assert same, f"{name}: training went on otherwise than without the bad steps"
            assert moved, f"{name}: nothing was trained"


def with_and_without_a_bad_step(
    runs: dict[str, dict[str, Any]],
) -> dict[str, tuple[list[bool], bool, bool, bool]]:
    """By case: which of four steps were taken; whether the bad ones moved the weights, and left any trace at all."""
    outcomes = {}
    good = [random_batch(4, seed=seed, vocab=60) for seed in range(2)]
    for name, run in runs.items():
        plan = planned({**run, "optimizer": {**run["optimizer"], "lr_scheduler_type": "constant"}})
        policy, clean = policy_of(plan), policy_of(plan)
        start = weights_of(policy)
        taken = [one_step(policy, good[0])]
        before = weights_of(policy)
        taken += [one_step(policy, good[1], loss_factor=math.nan), one_step(policy, good[1], gradient_factor=math.inf)]
        after = weights_of(policy)
        taken.append(one_step(policy, good[1]))
        for batch in good:
            one_step(clean, batch)
        end = weights_of(policy)
        outcomes[name] = (taken, equal(before, after), equal(end, weights_of(clean)), not equal(start, before))
    return outcomes


def one_step(policy: Any, batch: Any, *, loss_factor: float = 1.0, gradient_factor: float = 1.0) -> bool:
    """An optimizer step of two micro-batches, the second one on rank 1 spoilt by the factors; whether it was taken."""
    from dsdpo.objective.logps import pair_logps

    for micro in range(2):
        logps = pair_logps(policy, batch)
        losses = torch.nn.functional.softplus(logps.rejected - logps.chosen)
        if micro == 1 and torch.distributed.get_rank() == 1:
            losses = losses * loss_factor
            if gradient_factor != 1.0:
                losses.register_hook(lambda gradient: gradient * gradient_factor)
        rewards = torch.zeros_like(losses)
        output = LossOutput(losses, rewards, rewards)
        policy.backward(marked(losses.mean(), output, torch.ones(len(losses))), scale_wrt_gas=False)
    policy.step()
    return bool(policy.was_step_applied())


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    from dsdpo.engine.shards import whole_state_dict

    state = whole_state_dict(policy.module, keep=True)
    assert state is not None
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("where", ["losses", "chosen_rewards", "rejected_rewards"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_reaches_the_gradient(where: str, value: float) -> None:
    """Also where the loss is finite, as with an infinitely unlikely reference; a filler pair's values do not count."""
    for weight, spoils in ((torch.tensor([1.0, 1.0]), True), (torch.tensor([1.0, 0.0]), False)):
        parameter = torch.ones(2, requires_grad=True)
        fields = {name: torch.zeros(2) for name in ("losses", "chosen_rewards", "rejected_rewards")}
        fields[where][1] = value
        marked(parameter.sum(), LossOutput(**fields), weight).backward()
        assert parameter.grad is not None
        assert bool(parameter.grad.isnan().all()) == spoils
        assert bool(parameter.grad.isfinite().all()) != spoils


def test_stop_names_the_pairs_and_skip_goes_on_from_there(inputs: Path, tmp_path: Path) -> None:
    """A word whose embedding comes out as NaN, in the rows of one pair, the shortest: as broken data would do it.

    One of the ranks has a filler in every step, which must not be that pair.
    """
    run, bad_pair, word = run_with_a_bad_pair(tmp_path, inputs)
    last = run["train"]["max_steps"]
    folder = Path(run["output_dir"])
    (code, said), (other_code, other_said) = run_ranks(2, end_of_training, write_json(tmp_path / "run.yaml", run), word)
    assert code == other_code == 1
    assert f"the loss of pair {bad_pair} is not finite" in said
    assert "--train.on_nonfinite skip" in said
    assert other_said == "", "one message for all ranks"
    (row,) = rows(folder / "nonfinite.jsonl")
    step = row["step"]
    assert step > 2
    assert row["action"] == "stop"
    assert row["found"] == "loss"
    assert set(row["losses"]) == {str(bad_pair)}
    assert row["losses"][str(bad_pair)]["loss"] == "nan"
    assert len(row["pair_ids"]) == 6
    assert bad_pair in row["pair_ids"]
    assert [done["step"] for done in metrics(folder)] == list(range(1, step))
    assert not (folder / "model").exists()

    resumed = {**run, "checkpoint": {**run["checkpoint"], "resume": "auto"}}
    run_ranks(2, train_with_a_bad_word, {**resumed, "train": {**run["train"], "on_nonfinite": "skip"}}, word)
    assert [row["action"] for row in rows(folder / "nonfinite.jsonl")] == ["skip"], "the stopped step was run again"
    done = metrics(folder)
    assert [row["step"] for row in done] == list(range(1, last + 1))
    assert [row["train/skipped_steps"] for row in done] == [int(row["step"] >= step) for row in done]
    assert "loss" not in done[step - 1], "nothing was learned in that step"
    assert all(math.isfinite(value) for row in done for value in row.values())
    assert [row["step"] for row in rows(folder / "pairs.jsonl")] == list(range(1, last + 1))
    assert f"skipped  1 of {last} steps" in describe_results(folder)


def test_a_run_that_skips_too_much_fails_and_exports_nothing(inputs: Path, tmp_path: Path) -> None:
    """Every pair but one has the bad word: three steps in a row end the run; a shorter run ends as none was taken."""
    run, _, word = run_with_a_bad_pair(tmp_path, inputs, everywhere=True, policy_zero="zero2", reference_zero="zero0")
    run["train"] = {"max_steps": 8, "on_nonfinite": "skip", "max_skipped_steps": 3}
    run["data"]["eval"] = run["data"]["train"]
    (code, said), _ = run_ranks(2, end_of_training, write_json(tmp_path / "run.yaml", run), word)
    folder = Path(run["output_dir"])
    assert code == 1
    assert "3 steps in a row had to be left out" in said
    assert [row["step"] for row in rows(folder / "nonfinite.jsonl")] == [1, 2, 3]
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert first["eval/loss"] is None
    run["train"]["max_steps"] = 2
    run["overwrite_output_dir"] = True
    (code, said), _ = run_ranks(2, end_of_training, write_json(tmp_path / "run.yaml", run), word)
    assert code == 1
    assert "none of the 2 steps could be taken" in said
    assert not (folder / "model").exists()


def test_weights_that_are_not_finite_are_called_by_name(inputs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run, _, word = run_with_a_bad_pair(tmp_path, inputs)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    model.save_pretrained(tmp_path / "model")
    (code, said), (other_code, _) = run_ranks(2, end_of_training, write_json(tmp_path / "run.yaml", run), word)
    assert code == other_code == 2
    assert "model.path" in said
    assert "model.layers.1.mlp.up_proj.weight" in said
    assert "before training has begun" in said


def run_with_a_bad_pair(
    tmp_path: Path, inputs: Path, *, everywhere: bool = False, **stages: Any
) -> tuple[dict[str, Any], int, int]:
    """Five steps of six pairs, of which one, in the third step or later, or all but one have a bad word; id and word.

    The word is bad under `train_with_a_bad_word`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsdpo.data.plan import epoch_order

    lines = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()[:64]]
    bad_pair = int(epoch_order(64, seed=42, epoch=0, shuffle=True)[15])
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tokenizer.add_tokens(["zzz"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for index in range(1, 64) if everywhere else [bad_pair]:
        lines[index] = {"prompt": "zzz", "chosen": "zzz zzz", "rejected": "zzz"}
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = settings(
        tmp_path,
        inputs,
        model={"path": str(tmp_path / "model")},
        data={"train": str(data), "cache_dir": str(tmp_path / "cache")},
        batch={"pairs_per_step": 6},
        train={"max_steps": 5},
        checkpoint={"every_steps": 1},
        **stages,
    )
    return run, bad_pair, tokenizer.convert_tokens_to_ids("zzz")


@contextmanager
def bad_word(word: int) -> Iterator[None]:
    """A block in which every embedding of a word is NaN, though its weights are not."""
    original = torch.nn.Embedding.forward

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        return original(self, ids) * torch.where(ids == word, math.nan, 1.0)[..., None]

    torch.nn.Embedding.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Embedding.forward = original  # type: ignore[method-assign]


def train_with_a_bad_word(run: dict[str, Any], word: int) -> None:
    with bad_word(word):
        train_here(run)


def end_of_training(run_file: str, word: int) -> tuple[int, str]:
    """The command's exit code on this rank, and what it says of errors, under `bad_word`."""
    from dsdpo.__main__ import main

    with bad_word(word), redirect_stderr(io.StringIO()) as said:
        code = main(["train", run_file])
    return code, "".join(line for line in said.getvalue().splitlines() if line.startswith("dsdpo"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
