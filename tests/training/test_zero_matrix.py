"""One truth under every DeepSpeed config: the same losses, from ln 2 on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.run import RunConfig
from dsdpo.distributed import rank
from dsdpo.run.plan import shared_configs
from tests.ranks import restart, run_ranks
from tests.runs import POLICIES, REFERENCES, each_once, losses, settings, train_on, write_json


@pytest.fixture(scope="module")
def truth(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One process, so nothing is partitioned, and all pairs of a step in one micro-batch, padded."""
    folder = tmp_path_factory.mktemp("truth")
    plain = {"data": {"layout": "padded"}, "batch": {"pairs_per_micro_batch": 8}}
    return losses(train_on(1, settings(folder, inputs, policy_zero="zero1", reference_zero="zero0", **plain)))


@pytest.mark.parametrize(("policy", "reference"), each_once(POLICIES, REFERENCES, whole="zero3"))
def test_same_losses(policy: str, reference: str, inputs: Path, truth: list[float], tmp_path: Path) -> None:
    found = losses(train_on(2, settings(tmp_path, inputs, policy_zero=policy, reference_zero=reference)))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(truth, abs=1e-5)
    assert truth[-1] < math.log(2) - 1e-3, "nothing was learned, so nothing was compared"


def test_a_second_copy_of_the_weights_on_each_node(inputs: Path, truth: list[float], tmp_path: Path) -> None:
    """hpZ on two nodes of two ranks, beside a reference that has none."""
    run = settings(tmp_path, inputs)
    zero = {**POLICIES["zero3"]["zero_optimization"], "zero_hpz_partition_size": 2}
    run["deepspeed"] = write_json(tmp_path / "hpz.json", {"zero_optimization": zero})
    restart(4)  # DeepSpeed makes the groups once in a process
    try:
        assert losses(train_on(4, run)) == pytest.approx(truth, abs=1e-5)
        for of_nodes, group in (((2, 2, 2, 2), 2), ((2, 2, 1, 1), 1)):
            assert run_ranks(4, group_of, run, of_nodes) == [group] * 4
    finally:
        restart(4)


def group_of(run: dict[str, Any], of_nodes: tuple[int, ...]) -> int:
    """hpZ's group for "auto", as this rank has it, if the launcher said so of the ranks on its node."""
    raw = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    path = write_json(Path(run["output_dir"]).with_name(f"rank-{rank()}.json"), raw)
    settled = RunConfig.model_validate({**run, "deepspeed": path})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(of_nodes[rank()]))
        policy, _ = shared_configs(settled, "run.yaml", hidden_size=32, total_steps=4)
    return int(policy["zero_optimization"]["zero_hpz_partition_size"])


def test_derived_reference_and_checkpointing(inputs: Path, truth: list[float], tmp_path: Path) -> None:
    """No reference JSON: derived from the policy's. Activation checkpointing changes nothing."""
    run = settings(tmp_path, inputs, reference_zero=None, model={"gradient_checkpointing": True})
    assert losses(train_on(2, run)) == pytest.approx(truth, abs=1e-5)


BY_TOKENS = {"pairs_per_micro_batch": None, "tokens_per_micro_batch": 100}


@pytest.mark.parametrize(("batch", "layout"), [({"pairs_per_micro_batch": 1}, "packed"), (BY_TOKENS, "padded")])
def test_micro_batches_do_not_matter(
    batch: dict, layout: str, inputs: Path, truth: list[float], tmp_path: Path
) -> None:
    """Padded; and as little at once as there is, in the reference's own passes too (`score_tokens`)."""
    reference = {"score_tokens": 1} if layout == "packed" else {}
    run = settings(tmp_path, inputs, batch=batch, data={"layout": layout}, reference=reference)
    assert losses(train_on(2, run)) == pytest.approx(truth, abs=1e-5)


def test_more_ranks_than_pairs_in_a_step(inputs: Path, tmp_path: Path) -> None:
    """One pair a step on two ranks: the other rank is kept busy and counts for nothing."""
    one_pair = {"pairs_per_step": 1, "pairs_per_micro_batch": 1}
    alone = losses(train_on(1, settings(tmp_path / "one", inputs, batch=one_pair)))
    assert losses(train_on(2, settings(tmp_path / "two", inputs, batch=one_pair))) == pytest.approx(alone, abs=1e-5)
