"""The reference's identity: one digest wherever the weights lie, another as soon as one of them differs."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsdpo.config.model import ModelConfig
from dsdpo.objective.logps import ResponseScorer
from dsdpo.reference.identity import DECISIVE, ReferenceIdentity, architecture_digest, identify, weights_digest
from tests.data.helpers import letter_tokenizer
from tests.ranks import run_ranks
from tests.runs import POLICIES, REFERENCES, settings, train_on
from tests.tiny import tiny_lm

IDENTITY = ReferenceIdentity(
    weights="a" * 32,
    architecture="b" * 32,
    dtype="bfloat16",
    tokenizer="c" * 32,
    template="d" * 32,
    max_length=512,
    logps_version=1,
    path="model",
    revision=None,
    strategy="precomputed",
    sync=None,
)


def digest_of_engine(run: dict[str, Any], which: str) -> str:
    """On a rank: the digest of the weights in the run's policy or reference engine."""
    from dsdpo.config.run import RunConfig
    from dsdpo.engine.build import build_policy, build_reference
    from dsdpo.engine.quirks.destroy import destroy_engine
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run))
    if which == "policy":
        engine = build_policy(plan.run, plan.policy_config, total_steps=plan.total_steps, layout=plan.layout.name)
    else:
        engine = build_reference(plan.reference.model, plan.reference_config, layout=plan.layout.name)
    digest = weights_digest(engine.module)
    destroy_engine(engine)
    return digest


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_same_digest_in_every_engine(world_size: int, inputs: Path, tmp_path: Path) -> None:
    """Three ranks cut parameters unevenly, so that shards have padding. There and on one rank, every second engine."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    expected = weights_digest(ResponseScorer(plain))
    engines = [("policy", {"policy_zero": name}) for name in POLICIES]
    engines += [("reference", {"policy_zero": "zero3", "reference_zero": name}) for name in REFERENCES]
    for which, zero in engines if world_size == 2 else engines[::2]:
        found = run_ranks(world_size, digest_of_engine, settings(tmp_path, inputs, **zero), which)
        assert found == [expected] * world_size, (which, zero)


def test_digest_equals_plain_arithmetic() -> None:
    """splitmix64 in Python's own integers, element by element."""
    module = nn.Linear(3, 2)
    module.register_buffer("scale", torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    module.register_buffer("scratch", torch.rand(5), persistent=False)
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    sums = [0, 0]
    for name, tensor, bits in (
        ("weight", module.weight, torch.int32),
        ("bias", module.bias, torch.int32),
        ("scale", module.scale, torch.int16),
    ):
        for seed in (1, 2):
            start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
            for place, value in enumerate(tensor.detach().flatten().view(bits).tolist()):
                x = (start + place * 0x9E3779B97F4A7C15 & mask) ^ (value * 0xD1342543DE82EF95 & mask)
                sums[seed - 1] = sums[seed - 1] + mix(x) & mask
    assert weights_digest(module) == f"{sums[0]:016x}{sums[1]:016x}"


def test_digest_is_independent_of_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ResponseScorer(tiny_lm())
    whole = weights_digest(module)
    monkeypatch.setattr("dsdpo.reference.identity.CHUNK_CPU", 7)
    assert weights_digest(module) == whole


def test_digest_changes_with_values_names_and_order() -> None:
    lm = tiny_lm()
    before = weights_digest(ResponseScorer(copy.deepcopy(lm)))
    weight = lm.model.layers[1].mlp.up_proj.weight.data

    weight[3, 5] += 1e-6
    assert weights_digest(ResponseScorer(copy.deepcopy(lm))) != before, "one element"
    weight[3, 5] = tiny_lm().model.layers[1].mlp.up_proj.weight[3, 5]
    assert weights_digest(ResponseScorer(copy.deepcopy(lm))) == before, "and back"

    weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    assert weights_digest(ResponseScorer(copy.deepcopy(lm))) != before, "two elements swapped"

    layers = tiny_lm()
    first, second = layers.model.layers[0].mlp.up_proj, layers.model.layers[1].mlp.up_proj
    first.weight.data, second.weight.data = second.weight.data.clone(), first.weight.data.clone()
    assert weights_digest(ResponseScorer(layers)) != before, "two tensors of one shape swapped"

    assert weights_digest(ResponseScorer(tiny_lm(seed=1))) != before, "another model of the same shape"
    assert weights_digest(ResponseScorer(tiny_lm().bfloat16())) != before, "another dtype"


def test_wrappers_and_other_adapters_do_not_count() -> None:
    """The same base weights below a LoRA adapter; the adapter itself counts only where it is the reference's."""
    import peft

    base = weights_digest(ResponseScorer(tiny_lm()))
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = ResponseScorer(peft.get_peft_model(tiny_lm(), config))
    assert weights_digest(wrapped) == base
    with_adapter = weights_digest(wrapped, adapter="default")
    assert with_adapter != base
    other_name = peft.get_peft_model(tiny_lm(), config, adapter_name="reference")
    for theirs, ours in zip(other_name.parameters(), wrapped.lm.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    assert weights_digest(ResponseScorer(other_name), adapter="reference") == with_adapter


def test_architecture_without_weights_counts() -> None:
    """Same tensors, another function: RoPE's base and the soft-cap stand in the configuration alone."""
    one, other = tiny_lm().config, tiny_lm(rope_theta=1234.0).config
    assert architecture_digest(one) != architecture_digest(other)
    same = copy.deepcopy(one)
    same._name_or_path, same.use_cache, same.transformers_version = "elsewhere", not one.use_cache, "0.0"
    assert architecture_digest(same) == architecture_digest(one)


@pytest.mark.parametrize("field", DECISIVE)
def test_key_changes_with_what_decides_log_probs(field: str) -> None:
    other = replace(IDENTITY, **{field: 7 if isinstance(getattr(IDENTITY, field), int) else "other"})
    assert other.key() != IDENTITY.key()
    [difference] = IDENTITY.differences(other)
    assert difference.startswith(field)
    for value in (getattr(IDENTITY, field), getattr(other, field)):
        assert str(value)[:12] in difference


def test_key_ignores_where_weights_lay() -> None:
    other = replace(IDENTITY, path="copy of model", revision="abc", strategy="separate")
    assert other.key() == IDENTITY.key()
    assert [text.split()[0] for text in other.differences(IDENTITY)] == ["path", "revision", "strategy"]


def test_json_round_trip() -> None:
    assert ReferenceIdentity.from_json(IDENTITY.to_json()) == IDENTITY
    with pytest.raises(TypeError, match="weights"):
        ReferenceIdentity.from_json({key: value for key, value in IDENTITY.to_json().items() if key != "weights"})


def test_date_stands_only_where_the_template_writes_one() -> None:
    dated = replace(IDENTITY, date="2024-02-03")
    assert "date" not in IDENTITY.to_json()
    assert ReferenceIdentity.from_json(dated.to_json()) == dated
    assert dated.differences(replace(IDENTITY, date="2025-01-01")) == ["date (2024-02-03, not 2025-01-01)"]
    # What an older version wrote says nothing of the date, which was in the tokens even then.
    old = ReferenceIdentity.from_json(IDENTITY.to_json())
    assert dated.differences(old) == old.differences(dated) == []
    assert dated.key() == old.key()


@pytest.mark.parametrize(("template", "date"), [("{{ strftime_now('%Y') }}", "2024-02-03"), ("{{ bos_token }}", None)])
def test_identity_has_the_date_that_the_template_is_told(template: str, date: str | None) -> None:
    tokenizer = letter_tokenizer(template=template)
    identity = identify(
        ResponseScorer(tiny_lm()),
        model=ModelConfig(path="model"),
        tokenizer=tokenizer,
        max_length=8,
        strategy="separate",
        date="2024-02-03",
    )
    assert identity.date == date


def test_every_run_and_checkpoint_says_which_reference(inputs: Path, tmp_path: Path) -> None:
    found = {}
    for strategy in ("separate", "precomputed"):
        run = settings(
            tmp_path / strategy,
            inputs,
            policy_zero="zero2",
            reference={"strategy": strategy},
            checkpoint={"every_steps": 1},
            train={"max_steps": 1},
        )
        train_on(2, run)
        records = [
            tmp_path / strategy / "run" / name for name in ("identity.json", "checkpoints/step-000001/identity.json")
        ]
        first, second = (ReferenceIdentity.from_json(json.loads(path.read_text())) for path in records)
        assert first == second
        found[strategy] = first
    assert found["separate"].differences(found["precomputed"]) == ["strategy (separate, not precomputed)"]
    assert found["separate"].path == str(inputs / "model")
