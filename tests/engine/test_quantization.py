"""Base weights in 4 bits: the same losses under each ZeRO stage, close to those of the weights they stand for."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from dsdpo.config.run import RunConfig
from dsdpo.engine.self_check import Answers, measured_bias
from dsdpo.reference.identity import ReferenceIdentity
from tests.adapters import dequantized
from tests.ranks import run_ranks
from tests.reference.test_adapter import lora_run
from tests.runs import losses, metrics, train_here, train_on

pytest.importorskip("bitsandbytes")
LN_2 = math.log(2)
NF4 = {"bits": 4}


def quantized_run(folder: Path, inputs: Path, **sections: Any) -> dict[str, Any]:
    """A run of 4 steps with LoRA on a base in 4 bits."""
    model = {"quantization": NF4, **sections.pop("model", {})}
    return lora_run(folder, inputs, {"r": 4}, model=model, **sections)


@pytest.fixture(scope="module")
def truth(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """LoRA on the weights that the 4 bits stand for, held in 32 bits."""
    folder = tmp_path_factory.mktemp("truth")
    path = dequantized(folder / "model", inputs / "model")
    return losses(train_on(2, lora_run(folder, inputs, {"r": 4}, policy_zero="zero2", model={"path": path})))


@pytest.mark.parametrize(
    ("policy", "storage", "reference"),
    [
        ("zero1", "model", "adapter"),
        ("zero2", "uint8", "adapter"),
        ("zero3", "uint8", "separate"),  # storage in the model's dtype and the adapter are in the next test
    ],
)
def test_losses_are_those_of_the_weights_that_the_bits_stand_for(
    policy: str, storage: str, reference: str, truth: list[float], inputs: Path, tmp_path: Path
) -> None:
    quantization = {**NF4, "storage_dtype": storage}
    run = quantized_run(
        tmp_path, inputs, policy_zero=policy, model={"quantization": quantization}, reference={"strategy": reference}
    )
    found = losses(train_on(2, run))
    assert found[0] == pytest.approx(LN_2, abs=1e-6)
    assert found == pytest.approx(truth, abs=1e-4)
    assert min(found) < LN_2 - 1e-3, "nothing was learned, so nothing is compared"
    assert "nf4" in (tmp_path / "run" / "config.yaml").read_text()


def test_rows_split_over_ranks_tiles_and_offloaded_activations_change_nothing(
    truth: list[float], inputs: Path, tmp_path: Path
) -> None:
    model = {"mlp_tile_tokens": 16, "gradient_checkpointing": True, "activation_offloading": True}
    run = quantized_run(tmp_path, inputs, policy_zero="zero3", model=model, distributed={"sequence_parallel": 2})
    assert losses(train_on(2, run)) == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize(
    ("zero", "optimizer"),
    [
        ("zero3", {"type": "adamw_8bit"}),
        ("zero2", {"type": "lion", "learning_rate": 2e-3}),
        ("zero3", {"type": "muon", "learning_rate": 2e-2}),
        ("zero2", {"type": "sgd", "learning_rate": 3.0, "momentum": 0.9}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_each_optimizer_trains_the_adapter(zero: str, optimizer: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    run = quantized_run(tmp_path, inputs, policy_zero=zero, train={"overfit_first_step": True})
    run["optimizer"] = {**run["optimizer"], **optimizer}
    found = losses(train_on(2, run))
    assert found[0] == pytest.approx(LN_2, abs=1e-6)
    assert found == sorted(found, reverse=True)
    assert found[-1] < LN_2 - 0.01


@pytest.mark.nightly
def test_twenty_steps_on_real_pairs(shared: Path, tmp_path: Path, record_property: Any) -> None:
    """In bfloat16 no further from LoRA on the weights that the bits stand for than two ZeRO stages are by rounding.

    docs/models.md has the figures that this prints (pytest -s).
    """
    model, rows = shared / "models" / "tiny-sft", tmp_path / "rows.jsonl"
    lines = (shared / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(sorted(lines, key=len)[1000:1160]))
    base = dequantized(tmp_path / "base", model, dtype="bfloat16")
    known: dict[str, list[float]] = {}

    def twenty(name: str, zero: str, path: str, beside: str | None = None, **more: Any) -> float:
        """Train; the largest difference of a loss from the run `beside`."""
        run = quantized_run(
            tmp_path / name.replace(" ", "-"),
            tmp_path,
            policy_zero=zero,
            model={"path": path, "dtype": "bfloat16", "quantization": None, **more},
            data={"train": str(rows), "max_length": 512},
            train={"max_steps": 20},
        )
        run["optimizer"] = {"learning_rate": 1e-3}
        known[name] = losses(train_on(2, run))
        apart = max(abs(a - b) for a, b in zip(known[name], known[beside or name], strict=True))
        print(f"{name}: last loss {known[name][-1]:.4f}, at most {apart:.1e} beside {beside}")
        record_property(f"{name} beside {beside}", f"{apart:.1e}")
        return apart

    twenty("LoRA, zero2", "zero2", base)
    between_stages = twenty("LoRA, zero3", "zero3", base, "LoRA, zero2")
    bits = [
        twenty(f"QLoRA, {zero}", zero, str(model), f"LoRA, {zero}", quantization=NF4) for zero in ("zero2", "zero3")
    ]
    unlike = twenty("LoRA on the unquantized base, zero2", "zero2", str(model), "LoRA, zero2")
    assert [found[0] for found in known.values()] == pytest.approx([LN_2] * 5, abs=1e-6)
    assert all(min(found) < LN_2 - 0.02 for found in known.values()), "little was learned, so little is compared"
    assert max(bits) <= between_stages, "more than bfloat16's rounding"
    assert unlike > max(bits), "what 4 bits change could not be told from rounding"


def test_resumed_run_is_the_uninterrupted_one_and_its_adapter_merges_into_the_base(
    inputs: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = quantized_run(
        tmp_path, inputs, policy_zero="zero3", checkpoint={"every_steps": 2}, export={"merge_adapter": True}
    )
    whole = losses(train_on(2, run))
    adapter = tmp_path / "run" / "model"
    trained = load_file(adapter / "adapter_model.safetensors")
    for newest in ("checkpoints/step-000004", "model", "merged"):
        shutil.rmtree(tmp_path / "run" / newest)
    assert losses(train_on(2, {**run, "checkpoint": {"every_steps": 2, "resume": "auto"}})) == whole
    resumed = load_file(adapter / "adapter_model.safetensors")
    assert resumed.keys() == trained.keys()
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)
    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    merged = AutoModelForCausalLM.from_pretrained(adapter.parent / "merged", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(merged, PeftModel.from_pretrained(base, adapter)(ids).logits, rtol=1e-4, atol=1e-4)


def test_identity_follows_bits_and_scales() -> None:
    """The same under stages 0 and 3; another where the weights have the same bits but twice the scale."""
    (plain, doubled, shards), *_ = run_ranks(2, digests_here)
    assert plain == shards
    assert plain != doubled


def digests_here() -> tuple[str, str, str]:
    import bitsandbytes
    import deepspeed

    from dsdpo.reference.identity import weights_digest

    def layer(scale: float) -> Any:
        torch.manual_seed(0)
        linear = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", quant_storage=torch.bfloat16)
        linear.weight = bitsandbytes.nn.Params4bit(
            scale * torch.randn(32, 64), quant_storage=torch.bfloat16, module=linear, requires_grad=False
        )
        return linear.to("cpu")

    plain, doubled, parted = layer(1.0), layer(2.0), layer(1.0)
    assert torch.equal(plain.weight.data.view(torch.int16), doubled.weight.data.view(torch.int16)), "the same bits"
    whole = weights_digest(plain), weights_digest(doubled)
    deepspeed.zero.Init(module=parted, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})
    return *whole, weights_digest(parted)


def test_reference_in_4_bits_beside_a_policy_in_32(inputs: Path, tmp_path: Path) -> None:
    """How far off it is at the start stands in the plan, the identity and the model card, and stays on a resume."""
    run = lora_run(
        tmp_path, inputs, {"r": 4}, reference={"strategy": "separate", "quantization": NF4}, policy_zero="zero2",
        checkpoint={"every_steps": 2}, tracking={"every_steps": 1},
    )  # fmt: skip
    plan, rows = run_ranks(2, planned_and_trained, run)[0]
    found, folder = losses(rows), tmp_path / "run"
    assert "reference has the policy's weights in fewer bits (4-bit nf4, double)" in plan
    assert found[0] != pytest.approx(LN_2, abs=1e-6)
    assert found[0] == pytest.approx(LN_2, abs=0.05)
    identity = json.loads((folder / "identity.json").read_text())
    bias = identity["bias"]
    assert bias["spread"] > 0
    assert 0 < abs(bias["mean"]) < 5
    assert f"a response gets {bias['mean']:+.3f} nats on average" in (folder / "model" / "README.md").read_text()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    saved = folder / "checkpoints" / "step-000002" / "identity.json"
    assert json.loads(saved.read_text()) == identity
    assert losses(train_on(2, {**run, "checkpoint": {"every_steps": 2, "resume": "auto"}})) == found
    assert json.loads((folder / "identity.json").read_text()) == identity


def planned_and_trained(run: dict[str, Any]) -> tuple[str, list[dict[str, float]]]:
    """What the plan says, and the rows of the run."""
    from dsdpo.run.plan import plan_run
    from dsdpo.run.summary import describe_plan

    plan = plan_run(RunConfig.model_validate(run))
    train_here(run)
    return " ".join(describe_plan(plan).split()), metrics(Path(run["output_dir"]))


def test_bias_of_a_reference_in_fewer_bits() -> None:
    """Differences of -1 and 3 nats: 1 on average, 2 in size over 20 tokens a response, spread √8."""
    tokens = torch.tensor([10, 30])
    policy, reference = (
        Answers(torch.tensor(values), tokens, "float32", "model", 0.0) for values in ([-20.0, -60.0], [-21.0, -57.0])
    )
    bias = measured_bias(policy, reference)
    assert bias == {"mean": 1.0, "spread": 2.828427, "size_per_token": 0.1}
    identity = ReferenceIdentity("w", "a", "bfloat16", "t", "c", 64, 1, "m", None, "separate", None, bias=bias)
    assert "+1.000 nats on average beside the policy's (0.1000 a token, spread 2.828)" in identity.describe()
    assert ReferenceIdentity.from_json(identity.to_json()) == identity
    again, other = (replace(identity, bias={**bias, "mean": mean}) for mean in (1.2, 2.0))
    assert again.drift(identity) is None
    assert "was +1.000 nats off when training began, and is +2.000 now" in str(other.drift(identity))
    plain = replace(identity, bias=None)
    assert other.differences(identity) == other.differences(plain) == []
    assert other.key() == plain.key()
    assert "bias" not in plain.to_json()
    assert plain.drift(identity) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"lora": None}}, "weights in 4 bits do not train; set model.lora"),
        ({"reference": {"strategy": "separate", "sync_ref_model": True}}, "set reference.strategy to adapter"),
        ({"reference": {"strategy": "adapter", "quantization": NF4}}, "reference.quantization .* has no effect"),
        ({"model": {"quantization": {"bits": 8}}}, "is for models that do not train: see reference.quantization"),
        (
            {"reference": {"strategy": "separate", "quantization": {"bits": 8, "type": "fp4"}}},
            "type has no effect with bits 8",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: str, tmp_path: Path, inputs: Path) -> None:
    run = quantized_run(tmp_path, inputs)
    for section, values in changes.items():
        run[section] = {**run[section], **values}
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate(run)
