"""Strategy `precomputed`: the same training as with an engine, rows that are never scored twice, and memory back."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dsdpo.data.batch import FILLER_ID
from dsdpo.errors import CacheError
from dsdpo.objective.logps import PairLogps
from dsdpo.reference.precomputed import PrecomputedReference, check_audit
from tests.ranks import RankError, run_ranks
from tests.reference.test_identity import IDENTITY
from tests.runs import losses, settings, train_on
from tests.tiny import random_batch, random_pairs, tiny_lm

ROWS = 40


def rows_of(inputs: Path, count: int = ROWS) -> list[str]:
    """Rows of the demo, of different lengths."""
    return (inputs / "train.jsonl").read_text().splitlines()[: count * 7 : 7]


def run_with(folder: Path, inputs: Path, rows: list[str], **sections: Any) -> dict[str, Any]:
    """A run with a precomputed reference over `rows`, its store in `folder / "store"` unless `sections` say else.

    Its reference is whole on every rank: what a store does with the rows has nothing to do with who held the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n")
    reference = {"strategy": "precomputed", "store": str(folder / "store"), "score_tokens": 200}
    reference |= sections.pop("reference", {})
    return settings(
        folder,
        inputs,
        data={"train": str(data), "cache_dir": str(folder / "cache"), **sections.pop("data", {})},
        reference=reference,
        **{"reference_zero": "zero0", **sections},
    )


def precompute_here(run: dict[str, Any], shard_rows: int = 8) -> dict[str, Any]:
    """On a rank: what became of each data set, and the whole table by pair id."""
    from dsdpo.config.run import RunConfig
    from dsdpo.engine.build import build_reference
    from dsdpo.engine.quirks.destroy import destroy_engine
    from dsdpo.reference.identity import identify_reference
    from dsdpo.reference.precomputed import ScoringJob, fill_tables, open_store_on_ranks
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run))
    engine = build_reference(plan.reference.model, plan.reference_config, layout=plan.layout.name)
    identity = identify_reference(plan, engine.module, adapter=None)
    folder = open_store_on_ranks(plan.store_folder, identity)
    scorer = ScoringJob(engine, plan.run.reference.score_tokens, plan.run.reference.audit_rows, shard_rows=shard_rows)
    try:
        filled = fill_tables(plan, scorer, folder, dtype=identity.dtype)
    finally:
        destroy_engine(engine)
    table = PairLogps.cat([each.table for each in filled])
    return {
        "scored": [each.scored for each in filled],
        "audited": [each.audited for each in filled],
        "logps": torch.stack([table.chosen, table.rejected], dim=1).numpy(),
        "tokens": torch.stack([table.chosen_tokens, table.rejected_tokens], dim=1).numpy(),
        "folder": folder,
    }


def precompute_on(world_size: int, run: dict[str, Any], shard_rows: int = 8) -> dict[str, Any]:
    """On real ranks, which must agree; what they found."""
    first, *others = run_ranks(world_size, precompute_here, run, shard_rows)
    for other in others:
        assert np.array_equal(other["logps"], first["logps"])
        assert np.array_equal(other["tokens"], first["tokens"])
        assert (other["scored"], other["folder"]) == (first["scored"], first["folder"])
    return first


@pytest.mark.parametrize("policy", ["zero2", "zero3_offload"])
def test_same_losses_as_separate_and_held_out_pairs_have_their_own_rows(
    policy: str, inputs: Path, tmp_path: Path
) -> None:
    """Under whole weights and under shards: a table and the policy's engine share nothing else.

    Pair ids of training and held-out data do not mix: evaluation agrees with a reference engine's.
    """
    data = {"eval": str(inputs / "few.jsonl")}
    rows = {}
    for strategy in ("separate", "precomputed"):
        reference = {"strategy": strategy} | ({"store": str(tmp_path / "store")} if strategy == "precomputed" else {})
        run = settings(tmp_path / strategy, inputs, policy_zero=policy, data=data, reference=reference)
        rows[strategy] = train_on(2, run)
    found = losses(rows["precomputed"])
    assert found == pytest.approx(losses(rows["separate"]), abs=1e-6)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] < math.log(2) - 1e-3, "nothing was learned, so nothing was compared"
    held_out = {strategy: [row for row in found if "eval/loss" in row] for strategy, found in rows.items()}
    assert len(held_out["separate"]) == 2
    for one, other in zip(held_out["separate"], held_out["precomputed"], strict=True):
        # At step 0 rewards are rounding alone, and so is which one is larger.
        chance = ("/accuracies", "/ties", "/calibration_error") if one["step"] == 0 else ()
        names = {name for name in one if not name.endswith(chance)}
        assert {name: other[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-5)


def test_table_equals_a_plain_forward_pass(inputs: Path, tmp_path: Path) -> None:
    """Every row against one sequence at a time through the plain model."""
    from transformers import AutoModelForCausalLM

    from dsdpo.config.run import RunConfig
    from dsdpo.data.pairs import open_pairs
    from dsdpo.data.tokenize import prepare_pairs
    from dsdpo.data.tokenizer import load_tokenizer
    from tests.tiny import plain_logps

    run = run_with(tmp_path, inputs, rows_of(inputs), reference_zero="zero3")
    found = precompute_on(2, run)
    config = RunConfig.model_validate(run)
    tokenizer, data = load_tokenizer(config.model), config.data
    pairs = open_pairs(prepare_pairs(data.train, tokenizer, data=data, seed=config.train.seed, default_split="train"))
    with torch.no_grad():
        expected = plain_logps(AutoModelForCausalLM.from_pretrained(inputs / "model"), pairs[range(ROWS)])
    assert found["logps"] == pytest.approx(torch.stack(expected, dim=1).numpy(), abs=1e-3, rel=1e-5)
    assert np.array_equal(found["tokens"], pairs.lengths[:, 1:])


def test_only_new_rows_are_scored(inputs: Path, tmp_path: Path) -> None:
    """Other orders, ranks, stages, budgets, losses and learning rates find every row; a grown data set adds its own."""
    rows = rows_of(inputs)
    first = precompute_on(2, run_with(tmp_path, inputs, rows[:30], reference_zero="zero3"))
    assert (first["scored"], first["audited"]) == ([30], [0])

    filtered = precompute_on(1, run_with(tmp_path, inputs, rows[20:10:-1]))
    assert (filtered["scored"], filtered["audited"]) == ([0], [10])
    assert np.array_equal(filtered["logps"], first["logps"][20:10:-1])

    changes: dict[str, Any] = {
        "loss": {"type": "ipo", "beta": 0.7},
        "optimizer": {"learning_rate": 0.5},
        "train": {"max_steps": 9, "seed": 5},
        "batch": {"pairs_per_step": 4},
        "reference": {"score_tokens": 100},
        "output_dir": str(tmp_path / "elsewhere"),
    }
    unchanged = precompute_on(3, run_with(tmp_path, inputs, rows[:30], policy_zero="zero1", **changes))
    assert (unchanged["scored"], unchanged["audited"]) == ([0], [16])
    assert np.array_equal(unchanged["logps"], first["logps"])

    grown = precompute_on(2, run_with(tmp_path, inputs, [*rows[30:35], *rows[:30], *rows[35:], rows[36], rows[0]]))
    assert grown["scored"] == [10], "and a row that stands there twice is scored once"
    assert np.array_equal(grown["logps"][5:35], first["logps"])
    assert np.array_equal(grown["logps"][-2], grown["logps"][36])
    assert np.array_equal(grown["logps"][-1], first["logps"][0])


def test_what_changes_log_probs_is_scored_anew(inputs: Path, tmp_path: Path) -> None:
    rows = rows_of(inputs)[:10]
    first = precompute_on(2, run_with(tmp_path, inputs, rows))
    shorter = precompute_on(2, run_with(tmp_path, inputs, rows, data={"max_length": 63}))
    assert (shorter["scored"], shorter["folder"] != first["folder"]) == ([10], True)

    other = json.loads((inputs / "model" / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (inputs / "model").iterdir():
        os.link(path, folder / path.name)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**other, "rms_norm_eps": 0.1}))
    changed = precompute_on(2, run_with(tmp_path, inputs, rows, reference={"path": str(folder)}))
    assert changed["scored"] == [10]
    assert not np.allclose(changed["logps"], first["logps"])


def test_damaged_shard_is_scored_again(inputs: Path, tmp_path: Path) -> None:
    run = run_with(tmp_path, inputs, rows_of(inputs))
    first = precompute_on(2, run)
    shard = sorted(first["folder"].glob("part-*"))[2]
    lost = pq.read_metadata(shard).num_rows
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 16
    shard.write_bytes(content)
    again = precompute_on(2, run)
    assert again["scored"] == [lost]
    assert again["logps"] == pytest.approx(first["logps"], abs=1e-4)
    assert precompute_on(2, run)["scored"] == [0]


def precompute_apart(run: dict[str, Any], folder: str) -> dict[str, Any]:
    """On a rank: the same as a node of its own, with a store that no other rank sees."""
    run["reference"]["store"] = str(Path(folder) / os.environ["RANK"])
    mine = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = "0"
    try:
        return precompute_here(run)
    finally:
        os.environ["LOCAL_RANK"] = mine


def test_nodes_without_a_shared_disk_use_the_rows_of_all(inputs: Path, tmp_path: Path) -> None:
    """Each node has in its store what its own rank has scored; rows travel between ranks, not through files."""
    run = run_with(tmp_path, inputs, rows_of(inputs))
    first = run_ranks(2, precompute_apart, run, str(tmp_path))
    assert [found["scored"] for found in first] == [[ROWS], [ROWS]]
    stored = [sum(pq.read_metadata(path).num_rows for path in (tmp_path / node).glob("*/part-*")) for node in "01"]
    assert sum(stored) == ROWS
    assert min(stored) > 0
    shutil.rmtree(next((tmp_path / "1").glob("*/part-*")).parent)  # half of the rows are lost with a node's disk
    second = run_ranks(2, precompute_apart, run, str(tmp_path))
    assert [found["scored"] for found in second] == [[stored[1]], [stored[1]]]
    third = run_ranks(2, precompute_apart, run, str(tmp_path))
    assert [found["scored"] for found in third] == [[0], [0]]
    for found in (*first, *second, *third):
        assert found["logps"] == pytest.approx(first[0]["logps"], abs=1e-4)
        assert found["logps"].all()


def test_audit_refuses_other_numbers(inputs: Path, tmp_path: Path) -> None:
    """A whole, rightly signed shard whose numbers are not the reference's: nobody can tell but by scoring again."""
    from dsdpo.reference.store import ShardWriter, read_rows

    run = run_with(tmp_path, inputs, rows_of(inputs), reference={"audit_rows": ROWS})
    first = precompute_on(2, run, 1000)
    folder = first["folder"]
    keys = np.concatenate([pq.read_table(part)["key"].to_numpy().astype("S16") for part in folder.glob("part-*")])
    have, table = read_rows(folder, keys)
    assert have.all()
    for part in folder.glob("part-*"):
        part.unlink()
    table.rejected[7] -= 0.5
    writer = ShardWriter(folder, rank=0)
    writer.append(keys, table)
    writer.flush()
    with pytest.raises(RankError, match=r"(?s)CacheError.*rejected response of row.*1 of 40 audited rows.*delete"):
        precompute_on(2, run)
    run["reference"]["audit_rows"] = 0
    assert precompute_on(2, run)["scored"] == [0], "whoever switches the audit off trusts the store"


@pytest.mark.parametrize(("dtype", "off", "refused"), [
    ("float32", 2e-3, False), ("float32", 0.02, True), ("bfloat16", 0.5, False), ("bfloat16", 3.0, True),
    ("float32, autocast bfloat16", 0.5, False), ("float16", 0.5, True), ("float32", math.nan, True),
])  # fmt: skip
def test_audit_tolerance(dtype: str, off: float, refused: bool, tmp_path: Path) -> None:
    """-300 nats over 200 tokens: 500 · 1e-5 = 0.005 in float32, 500 · 4e-3 = 2 in bfloat16, 0.25 in float16."""
    logps, tokens = torch.full((2,), -300.0), torch.full((2,), 200)
    stored = PairLogps(logps, logps, tokens, tokens)
    again = PairLogps(logps, logps + torch.tensor([0.0, off]), tokens, tokens)

    def check() -> None:
        check_audit(stored, again, origins=np.array([[0, 4], [0, 5]]), dtype=dtype, folder=tmp_path)

    if not refused:
        return check()
    with pytest.raises(CacheError, match=r"rejected response of row 5 of source 0 is -300\.0000"):
        check()


def test_filler_pairs_get_finite_log_probs() -> None:
    rows = torch.tensor([[-5.0, -7.0], [-6.0, -8.0]]), torch.tensor([[1, 3], [2, 4]])
    table = PairLogps(*rows[0], *rows[1])
    batch = random_batch(3)
    batch.pair_ids[:] = batch.pair_ids.new_tensor([1, FILLER_ID, 0])
    [found] = PrecomputedReference(table.split([1, 1]), IDENTITY).score([batch])
    assert isinstance(found, PairLogps)
    assert found.chosen.tolist()[::2] == [-7, -5]
    assert found.rejected.tolist()[::2] == [-8, -6]
    assert (found.chosen_tokens.tolist()[::2], found.rejected_tokens.tolist()[::2]) == ([3, 1], [4, 2])
    assert found.chosen.isfinite().all()
    assert found.chosen_tokens.min() > 0


def count_hooks(run: dict[str, Any]) -> int:
    """On a rank: forward hooks of all kinds in the policy engine's modules."""
    from dsdpo.config.run import RunConfig
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.run.plan import plan_run

    policy, _ = build_policy_and_reference(plan_run(RunConfig.model_validate(run)))
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in policy.module.modules())


def test_policy_carries_no_hooks_of_the_reference(inputs: Path, tmp_path: Path) -> None:
    rows = rows_of(inputs)[:10]
    with_engine = settings(tmp_path / "separate", inputs)
    precomputed = run_with(tmp_path / "precomputed", inputs, rows, reference_zero="zero3")
    expected = run_ranks(2, count_hooks, with_engine)
    assert run_ranks(2, count_hooks, precomputed) == expected
    assert expected[0] > 0


def leftovers(model: str, config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """On a rank: what is still alive of an engine that has scored and was destroyed, and the memory it took."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    from dsdpo.config.model import ModelConfig
    from dsdpo.data.batch import collate_padded
    from dsdpo.engine.build import build_reference
    from dsdpo.engine.quirks.destroy import destroy_engine, used_memory
    from dsdpo.reference.base import score_batches

    gc.collect()
    before = used_memory()["host"]
    engine = build_reference(ModelConfig(path=model, dtype=dtype), config, layout="padded")
    batches = [collate_padded(random_pairs(2, seed=seed), pad_token_id=0) for seed in range(3)]
    for batch in batches:  # the trace of gathers is complete from the second pass on
        score_batches(engine, [batch], score_tokens=100)
    during = used_memory()["host"]
    parameter = next(iter(engine.module.parameters()))
    watched = [weakref.ref(engine), weakref.ref(engine.module), weakref.ref(parameter)]
    if hasattr(parameter, "ds_tensor"):
        watched.append(weakref.ref(parameter.ds_tensor))
    del parameter
    stack = len(FWD_MODULE_STACK)
    destroy_engine(engine)
    emptied = used_memory()["host"]
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in engine.module.modules())
    del engine
    gc.collect()
    return {
        "alive": [type(each()).__name__ for each in watched if each() is not None],
        "hooks": hooks,
        "stack": len(FWD_MODULE_STACK) - stack,
        "mib": [round((each - before) / 2**20, 1) for each in (during, emptied)],
    }


# Every kind of reference engine, whole and in shards, and either dtype.
ENGINES: list[tuple[dict[str, Any], str]] = [
    ({"stage": 0}, "float32"),
    ({"stage": 3}, "bfloat16"),
    ({"stage": 3, "stage3_param_persistence_threshold": 0}, "float32"),
]


def test_a_destroyed_engine_leaves_nothing(tmp_path: Path) -> None:
    """18.9 M parameters, 38 MiB on a rank that holds half of them in float32 and 19 MiB in bfloat16."""
    lm = tiny_lm(hidden_size=768, intermediate_size=1536, vocab_size=8192)
    for dtype in ("float32", "bfloat16"):
        lm.to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
    first = str(tmp_path / "float32"), engine_config({"stage": 3}, "float32"), "float32"
    run_ranks(2, leftovers, *first)  # what a process takes once and for all
    for zero, dtype in ENGINES:
        for found in run_ranks(2, leftovers, str(tmp_path / dtype), engine_config(zero, dtype), dtype):
            assert not found["alive"]
            assert not found["hooks"]
            assert found["stack"] == (-1 if zero["stage"] == 3 else 0)
            during, after = found["mib"]
            assert after < max(5, during / 4)
            # At stage 0 the weights stay what they are on disk, mapped memory that is not the process's own.
            assert during > 30 or zero["stage"] == 0, "the engine took memory"


def engine_config(zero: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A DeepSpeed JSON of two ranks."""
    return {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
    }
