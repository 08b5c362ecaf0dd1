"""`dsdpo evaluate` and `dsdpo score` of a trained run: training's own numbers, in sum and pair by pair."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dsdpo.commands.table import COMMANDS
from tests.commands.processes import main_here
from tests.ranks import run_ranks
from tests.runs import metrics, settings, train_on


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run of three steps with a beta that grows to 0.3, evaluated and saved after each."""
    spec = settings(
        tmp_path_factory.mktemp("trained"),
        inputs,
        model={"lora": {"r": 4}},
        reference_zero=None,
        data={"eval": str(inputs / "few.jsonl")},
        optimizer={"learning_rate": 2e-2},
        train={"max_steps": 3},
        loss={"beta": 0.1, "beta_schedule": {"end": 0.3}},
        evaluation={"every_steps": 1},
        checkpoint={"every_steps": 1},
    )
    train_on(2, spec)
    return Path(spec["output_dir"])


def command_here(argv: list[str]) -> str:
    """What a command says that ends well, in a process of a pool, whose process group it leaves alone."""
    with redirect_stdout(StringIO()) as said:
        name, *rest = argv
        parse = COMMANDS[name].parse
        assert parse is not None
        assert import_module(f"dsdpo.commands.{name}").main(parse(rest)) == 0
    return said.getvalue()


def said_by(*argv: object, ranks: int = 1) -> str:
    """What a command says that ends well."""
    return str(run_ranks(ranks, command_here, list(map(str, argv)))[0])


def tables_here(argv: list[str]) -> list[dict[str, Any]]:
    """The tables of numbers by pair that metrics are computed of when a command evaluates."""
    import dsdpo.training.evaluate as module

    tables, original = [], module.metrics_of

    def kept(table: dict[str, Any], *arguments: Any, **options: Any) -> dict[str, float]:
        tables.append({name: values.numpy() for name, values in table.items()})
        return original(table, *arguments, **options)

    module.metrics_of = kept
    try:
        command_here(argv)
    finally:
        module.metrics_of = original
    return tables


def refused(*argv: object) -> str:
    """A command's one message, with which it ends, exit code 2."""
    [(code, _, said)] = run_ranks(1, main_here, list(map(str, argv)))
    assert code == 2
    assert said.count("dsdpo: ") == 1
    assert "Traceback" not in said
    return str(said)


def evaluations(run: Path) -> list[dict[str, float]]:
    return [row for row in metrics(run) if "eval/loss" in row]


@pytest.mark.parametrize("checkpoint", [None, "2"])
def test_evaluation_afterwards_is_that_of_training(checkpoint: str | None, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    chosen = [] if checkpoint is None else ["--checkpoint", checkpoint]
    said_by("evaluate", run, *chosen, "--out", out)
    found, expected = json.loads(out.read_text()), evaluations(run)[3 if checkpoint is None else 2]
    assert found["step"] == expected["step"]
    assert abs(expected["eval/rewards/margins"]) > 1e-4, "nothing was learned"
    for name, value in expected.items():
        if name.startswith("eval/"):
            assert found["metrics"][name] == pytest.approx(value, abs=2e-5, rel=1e-5), name


def test_scores_are_the_evaluations_own_values_pair_by_pair(run: Path, inputs: Path, tmp_path: Path) -> None:
    few, out = inputs / "few.jsonl", tmp_path / "out.parquet"
    [tables] = run_ranks(1, tables_here, ["evaluate", str(run), "--data", str(few)])
    said_by("score", run, "--data", few, "--out", out, "--tokens")
    found, table = pq.read_table(out).to_pydict(), tables[0]
    names = {"chosen": "chosen_logp", "rejected": "rejected_logp", "reference_chosen": "reference_chosen_logp",
             "reference_rejected": "reference_rejected_logp"}  # fmt: skip
    for theirs, ours in names.items():
        np.testing.assert_allclose(found[ours], table[theirs], rtol=0, atol=2e-5)
    rewards = 0.3 * (table["chosen"] - table["reference_chosen"] - table["rejected"] + table["reference_rejected"])
    np.testing.assert_allclose(found["margin"], rewards, rtol=0, atol=1e-5)
    assert found["right"] == [margin > 0 for margin in found["margin"]]
    assert found["row"] == list(range(6))
    sums = [sum(tokens) for tokens in found["chosen_token_logps"]]
    np.testing.assert_allclose(sums, found["chosen_logp"], rtol=0, atol=1e-4)
    assert [len(ids) for ids in found["rejected_token_ids"]] == found["rejected_tokens"]


def test_scores_of_two_ranks_go_on_from_the_store_and_filter_rows(run: Path, inputs: Path, tmp_path: Path) -> None:
    rows = (inputs / "test.jsonl").read_text().splitlines()[:12]
    data, alone, both, kept = (tmp_path / name for name in ("rows.jsonl", "one.parquet", "two.parquet", "kept.jsonl"))
    marked = [{**json.loads(row), "kind": f"k{number % 3}"} for number, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in marked[:8]))
    said_by("score", run, "--data", data, "--out", alone)
    data.write_text("".join(json.dumps(row) + "\n" for row in marked))
    argv = ["score", run, "--data", data, "--out", both, "--rows", kept, "--keep", "margin > 0", "--by", "kind"]
    said = said_by(*argv, ranks=2)
    assert "12 pairs, 8 known" in said
    assert "k1" in said
    two, one = pq.read_table(both).to_pydict(), pq.read_table(alone).to_pydict()
    expected = [json.dumps(marked[row]) for row in two["row"]]
    assert kept.read_text().splitlines() == expected
    assert 0 < len(expected) < 12
    same = dict(zip(one["row"], one["margin"], strict=True))
    assert all(same[row] == margin for row, margin in zip(two["row"], two["margin"], strict=True) if row in same)


def test_models_are_scored_without_a_run(inputs: Path, run: Path, tmp_path: Path) -> None:
    model, few = str(inputs / "model"), str(inputs / "few.jsonl")
    out = tmp_path / "out.parquet"
    merged = tmp_path / "merged"
    said_by("merge", run / "model", model, "--out", merged, "--dtype", "float32")
    own = ["--data.cache_dir", str(inputs / "cache"), "--model.dtype", "float32", "--data.max_length", "64"]
    said_by("score", merged, "--reference", model, "--data", few, "--out", out, "--loss.beta", "0.3", *own)
    expected = evaluations(run)[-1]["eval/rewards/margins"]
    assert np.mean(pq.read_table(out).to_pydict()["margin"]) == pytest.approx(expected, abs=2e-5)
    assert "both" in refused("score", model, "--reference", model, "--data", few, "--out", out, *own)
    assert "--reference is missing" in refused("score", model, "--data", few, "--out", out)
    assert "--data is missing" in refused("score", model, "--reference", model, "--out", out)


def by_hand(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """log p(answer | question) under a model of transformers."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], return_tensors="pt"
    ).input_ids
    learned = len(tokenizer(f"{answer} <|end|>", add_special_tokens=False).input_ids)
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return float(logps[-learned:].sum())


def test_files_of_reward_bench_are_scored_as_by_hand(run: Path, inputs: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    subsets = ("alpacaeval-easy", "mt-bench-hard", "donotanswer", "xstest-should-respond", "math-prm", "hep-go")
    rows = [json.loads(line) for line in (inputs / "test.jsonl").read_text().splitlines()[:24]]
    texts = [{name: row[name][0]["content"] for name in ("prompt", "chosen", "rejected")} for row in rows]
    models = {"chosen_model": "one", "rejected_model": "two"}
    bench = [text | models | {"subset": subsets[k % 6], "id": k} for k, text in enumerate(texts)]
    (tmp_path / "bench" / "data").mkdir(parents=True)
    for split, part in (("filtered", bench), ("raw", bench[:1])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"bench/data/{split}-00000-of-00001.parquet")
    out = tmp_path / "out.parquet"
    said = said_by("score", run, "--data", tmp_path / "bench", "--out", out, "--rewardbench")

    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    before = [[by_hand(base, tokenizer, t["prompt"], t[side]) for side in ("chosen", "rejected")] for t in texts]
    policy = peft.PeftModel.from_pretrained(base, run / "model").eval()
    after = [[by_hand(policy, tokenizer, t["prompt"], t[side]) for side in ("chosen", "rejected")] for t in texts]
    rewards = 0.3 * (np.array(after) - np.array(before))
    found = pq.read_table(out).to_pydict()
    np.testing.assert_allclose(found["chosen_reward"], rewards[:, 0], rtol=0, atol=3e-5)
    np.testing.assert_allclose(found["rejected_reward"], rewards[:, 1], rtol=0, atol=3e-5)
    right = rewards[:, 0] > rewards[:, 1]
    share = {name: float(np.mean([right[k] for k in range(24) if k % 6 == i])) for i, name in enumerate(subsets)}
    assert 0 < right.mean() < 1, "all right or all wrong compares nothing"
    sections = {"Chat": share["alpacaeval-easy"], "Chat Hard": share["mt-bench-hard"],
                "Safety": (136 * share["donotanswer"] + 250 * share["xstest-should-respond"]) / (136 + 250),
                "Reasoning": (984 * share["math-prm"] + 164 * share["hep-go"]) / (984 + 164)}  # fmt: skip
    sections["RewardBench"] = sum(sections.values()) / 4
    for name, value in (share | sections).items():
        assert re.search(rf"^ *{name} .*{value:.1%}", said, re.MULTILINE), (name, value, said)


@pytest.mark.parametrize("loss", ["kto", "plackett_luce"])
def test_rated_completions_and_lists_are_scored(loss: str, run: Path, inputs: Path, tmp_path: Path) -> None:
    """Their rewards are those of the same responses in pairs, and the mean loss that of `dsdpo evaluate`."""
    rows = [json.loads(line) for line in (inputs / "few.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    green = [{"role": "assistant", "content": "it is green ."}]
    if loss == "kto":
        given = [{"prompt": prompt, "completion": (left, right)[place % 2], "label": place % 2 == 0}
                 for place, (prompt, left, right) in enumerate(pairs)]  # fmt: skip
    else:
        given = [{"prompt": prompt, "completions": [left, green, right], "scores": [3, 2, 1]}
                 for prompt, left, right in pairs]  # fmt: skip
    data, out, plain = tmp_path / "rows.jsonl", tmp_path / "out.parquet", tmp_path / "pairs.parquet"
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    options = ["--data", data, "--loss.type", loss, *([] if loss == "kto" else ["--data.pairing", "list"])]
    said_by("score", run, *options, "--out", out)
    said_by("score", run, "--data", inputs / "few.jsonl", "--out", plain)
    said_by("evaluate", run, *options, "--out", tmp_path / "e.json")
    found, two = pq.read_table(out).to_pydict(), pq.read_table(plain).to_pydict()
    evaluated = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert np.mean(found["loss"]) == pytest.approx(evaluated["eval/loss"], rel=1e-5)
    assert np.mean(found["right"]) == pytest.approx(evaluated["eval/rewards/accuracies"])
    if loss == "kto":
        sides = [("chosen", "rejected")[place % 2] for place in range(len(rows))]
        same = [two[f"{side}_reward"][place] for place, side in enumerate(sides)]
        np.testing.assert_allclose(found["chosen_reward"], same, rtol=0, atol=2e-5)
        assert np.isnan(found["rejected_reward"]).all()
        signs = np.where(np.arange(len(rows)) % 2, -1, 1)
        np.testing.assert_allclose(found["margin"], (np.array(same) - 0.3 * evaluated["eval/kl"]) * signs, atol=2e-5)
    else:
        np.testing.assert_allclose(found["margin"], two["margin"], rtol=0, atol=2e-5)
        gains = 0.3 * (np.array(found["logps"]) - np.array(found["reference_logps"]))
        np.testing.assert_allclose(gains[:, 0] - gains[:, 2], found["margin"], rtol=0, atol=2e-5)
        assert all(len(sizes) == 3 for sizes in found["completion_tokens"])


def test_a_model_alone_is_evaluated_with_a_loss_without_reference(inputs: Path, tmp_path: Path) -> None:
    """As the message says that asks for a reference."""
    start = ("evaluate", inputs / "model", "--data", inputs / "few.jsonl", "--out", tmp_path / "e.json")
    assert "or --loss.type cpo" in refused(*start)
    said_by(*start, "--loss.type", "cpo", "--model.dtype", "float32")
    assert "eval/rewards/margins" in json.loads((tmp_path / "e.json").read_text())["metrics"]


def test_reward_bench_sections() -> None:
    from dsdpo.run.reward_bench import section_scores

    found = section_scores({"math-prm": 0.5, "hep-go": 1.0, "mt-bench-hard": 0.25})
    assert found == {"Chat Hard": 0.25, "Reasoning": pytest.approx((984 * 0.5 + 164 * 1.0) / (984 + 164))}


def test_what_score_refuses(run: Path, inputs: Path, tmp_path: Path) -> None:
    few, out = inputs / "few.jsonl", tmp_path / "out.parquet"
    start = ("score", run, "--data", few, "--out")
    assert "is no .parquet file" in refused(*start, tmp_path / "out.csv")
    assert "there is no folder" in refused(*start, tmp_path / "nowhere" / "out.parquet")
    assert "has no column size" in refused(*start, out, "--keep", "size > 1")
    assert "is read; choose another" in refused(*start, out, "--rows", few)
    assert "--by: row 0" in refused(*start, out, "--by", "kind")
    assert "--out" in refused("score", run, "--data", few)
    assert "does not exist" in refused("score", run, "--data", tmp_path / "no.jsonl", "--out", out)
    assert "is no JSON" in refused(*start, out, "--columns", "{")
    assert "--data or --columns" in refused(*start, out, "--columns", '{"better": "x"}')
    assert "is not an option" in refused(*start, out, "--bla", "1")
    assert "there is last, best" in refused(*start, out, "--checkpoint", "9")
    assert "loss.use_weighting" in refused(*start, out, "--loss.use_weighting", "true")
    assert "--tokens" in refused(*start, out, "--loss.type", "kto", "--loss.beta_schedule", "null", "--tokens")
    assert "RUN|MODEL" in refused("score", "--out", out)
    assert "cannot be loaded" in refused("score", "no/model", "--reference", "x", "--data", few, "--out", out)
    assert "--out: there is no folder" in refused("evaluate", run, "--out", tmp_path / "no" / "f")
