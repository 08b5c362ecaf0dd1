"""The recipes are runs that load, and each strategy of docs/reference.md has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsdpo.config.load import load_run, run_parser
from dsdpo.engine.zero_config import read_deepspeed_json, resolve_policy_config, resolve_reference_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run, _ = load_run([str(path)], run_parser("dsdpo train", ""))
    sizes = {"run": run, "world_size": 8, "hidden_size": 4096}
    policy = resolve_policy_config(
        read_deepspeed_json(run.deepspeed), source=run.deepspeed, total_steps=1000, run_source=path, **sizes
    )
    own = run.reference.deepspeed
    resolve_reference_config(
        read_deepspeed_json(own) if own else None, source=own, policy_config=policy, run_source=path, **sizes
    )
    assert f"launch/recipes/{path.name}" in path.read_text(), "its first lines say how to start it"


def test_every_strategy_has_a_recipe() -> None:
    strategies = {"separate", "adapter", "precomputed", "policy_snapshot", "none"}
    found = {load_run([str(path)], run_parser("dsdpo train", ""))[0].reference_strategy() for path in RECIPES}
    assert found == strategies
