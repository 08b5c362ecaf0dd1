"""The policy's base weights as reference: the same numbers as any other reference with those weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import continued_adapter, merged
from tests.ranks import run_ranks
from tests.runs import losses, settings, train_on, write_json

STRONG = {"optimizer": {"learning_rate": 1e-2}}  # four steps that can be told from none


def lora_run(folder: Path, inputs: Path, lora: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A run with an adapter; a reference of its own engine if `sections` name the strategy `separate`."""
    model = {"lora": lora, **sections.pop("model", {})}
    return settings(folder, inputs, reference_zero=None, model=model, **STRONG, **sections)


def trained(world_size: int, run: dict[str, Any]) -> list[float]:
    """The losses of a run that learns something."""
    found = losses(train_on(world_size, run))
    assert min(found) < math.log(2) - 1e-3, "nothing was learned, so nothing is compared"
    return found


Truth = Callable[..., list[float]]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Losses of an adapter against a second model, in one process, where nothing is partitioned; each computed once."""
    known: dict[str, list[float]] = {}

    def losses_of(inputs: Path, lora: dict[str, Any], reference_path: str | None = None) -> list[float]:
        key = json.dumps([str(inputs / "model"), lora, reference_path])
        if key not in known:
            other = {"strategy": "separate"} | ({"path": reference_path} if reference_path else {})
            folder = tmp_path_factory.mktemp("truth")
            known[key] = trained(1, lora_run(folder, inputs, lora, reference=other, policy_zero="zero1"))
        return known[key]

    return losses_of


@pytest.fixture(scope="module")
def adapters(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Adapters to go on with, and the model into which each was merged: plain, with whole modules, with magnitudes."""
    kinds = {
        "plain": {},
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "dora": {"use_dora": True},
    }
    made = {}
    for name, fields in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        adapter = continued_adapter(folder, inputs, **fields)
        made[name] = adapter, merged(folder / "merged", inputs, adapter)
    return made


@pytest.mark.parametrize(
    ("policy", "checkpointing"), [("zero1", False), ("zero2", True), ("zero3", False), ("zero3_offload", True)]
)
def test_same_losses_as_a_second_model(
    policy: str, checkpointing: bool, inputs: Path, truth: Truth, tmp_path: Path
) -> None:
    model = {"gradient_checkpointing": checkpointing}
    run = lora_run(tmp_path, inputs, {"r": 4}, policy_zero=policy, model=model)
    found = trained(2, run)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(truth(inputs, {"r": 4}), abs=1e-6)
    assert not (tmp_path / "run" / "deepspeed_reference.json").exists()


@pytest.mark.parametrize("policy", ["zero2", "zero3_offload"])
def test_separate_reference_of_an_adapter(policy: str, inputs: Path, truth: Truth, tmp_path: Path) -> None:
    """Beside whole weights and shards; stage 3 without offload is in the test of an adapter and a second model."""
    run = lora_run(tmp_path, inputs, {"r": 4}, policy_zero=policy, reference={"strategy": "separate"})
    assert trained(2, run) == pytest.approx(truth(inputs, {"r": 4}), abs=1e-6)


# Every stage and every kind; a plain one at stage 3 is in the next test.
GOING_ON = [
    ("zero1", "plain"),
    ("zero2", "dora"),
    ("zero3", "modules_to_save"),
    ("zero3", "dora"),
    ("zero3_offload", "plain"),
]


@pytest.mark.parametrize(("policy", "kind"), GOING_ON)
def test_going_on_with_an_adapter(
    policy: str, kind: str, adapters: dict[str, tuple[str, str]], inputs: Path, truth: Truth, tmp_path: Path
) -> None:
    """The reference is a frozen copy of the adapter, whole modules and magnitudes too: like a model with it merged."""
    adapter, model = adapters[kind]
    found = trained(2, lora_run(tmp_path, inputs, {"path": adapter}, policy_zero=policy))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(truth(inputs, {"path": adapter}, model), abs=1e-5)


def test_going_on_with_an_adapter_and_a_second_model(inputs: Path, tmp_path: Path) -> None:
    """A separate reference of the policy's own model has the adapter too, unless the base is asked for."""
    lora = {"path": continued_adapter(tmp_path, inputs)}
    copied = trained(2, lora_run(tmp_path / "adapter", inputs, lora))
    separate = {"strategy": "separate"}
    assert trained(2, lora_run(tmp_path / "s", inputs, lora, reference=separate)) == pytest.approx(copied, abs=1e-6)
    base = {"strategy": "separate", "adapter": "base"}
    bare = trained(2, lora_run(tmp_path / "bare", inputs, lora, policy_zero="zero2", reference={"adapter": "base"}))
    other = trained(2, lora_run(tmp_path / "b", inputs, lora, policy_zero="zero2", reference=base))
    assert other == pytest.approx(bare, abs=1e-6)
    assert abs(bare[0] - math.log(2)) > 1e-3, "the base is another reference than the adapter"


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"r": 4, "use_dora": True, "use_rslora": True},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "layers_to_transform": [1],
            "lora_alpha": 64,
        },
    ],
    ids=["modules_to_save", "dora", "some modules"],
)
def test_kinds_of_adapter(lora: dict[str, Any], inputs: Path, truth: Truth, tmp_path: Path) -> None:
    """With checkpointing, from shards: like a second model of whole weights, which knows nothing of adapters."""
    found = trained(2, lora_run(tmp_path, inputs, lora, policy_zero="zero3", model={"gradient_checkpointing": True}))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(truth(inputs, lora), abs=1e-6)


def tie_embeddings(inputs: Path, folder: Path) -> Path:
    """The inputs with a model whose output head is its embedding."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(inputs / "model")
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text((inputs / "train.jsonl").read_text())
    return folder


@pytest.fixture(scope="module")
def tied(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tie_embeddings(inputs, tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize(
    ("policy", "saved"),
    [("zero3", None), ("zero2", ["lm_head"]), ("zero3", ["lm_head"]), ("zero3", ["embed_tokens"])],
)
def test_tied_embeddings(policy: str, saved: list[str] | None, tied: Path, truth: Truth, tmp_path: Path) -> None:
    """One matrix stays one, whichever of its names is trained whole."""
    lora = {"r": 4, "modules_to_save": saved}
    found = trained(2, lora_run(tmp_path, tied, lora, policy_zero=policy))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(truth(tied, lora), abs=1e-6)


def test_dropout_is_for_training_passes_only(inputs: Path, tmp_path: Path) -> None:
    """Half of the adapter's inputs dropped: other losses in training, the same reference and evaluation."""
    lora = {"path": continued_adapter(tmp_path, inputs, lora_dropout=0.5)}
    for policy in ("zero2", "zero3"):
        run = lora_run(tmp_path / policy, inputs, lora, policy_zero=policy)
        for answers in run_ranks(2, dropout_here, run):
            assert answers["training"] > 1e-2, "two training passes are alike: no dropout"
            assert answers["reference"] == answers["evaluation"] == 0.0
            assert answers["first evaluation"] == pytest.approx(math.log(2), abs=1e-6)


def dropout_here(run: dict[str, Any]) -> dict[str, float]:
    """How far two passes of each kind lie apart, in nats, and the loss before any step."""
    from dsdpo.config.loss import LossConfig
    from dsdpo.objective.logps import pair_logps
    from dsdpo.training.evaluate import evaluate
    from dsdpo.training.step_loss import StepLoss

    policy, reference, [window] = build_here(run | {"train": {"max_steps": 1}})
    batch = window.batches[0]
    apart = {}
    with torch.no_grad():
        first, second = (pair_logps(policy, batch).chosen for _ in range(2))
        apart["training"] = float((first - second).abs().max())
        [first], [second] = (reference.score([batch]) for _ in range(2))
        apart["reference"] = float((first.chosen - second.chosen).abs().max())
    loss_fn = StepLoss(LossConfig())
    first, second = (evaluate(policy, reference, loss_fn, [window.batches])["eval/loss"] for _ in range(2))
    assert policy.module.training, "evaluation and scoring leave the policy in train mode"
    return apart | {"evaluation": abs(first - second), "first evaluation": first}


def build_here(run: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """The engines of a run and its windows, on this rank."""
    from dsdpo.config.run import RunConfig
    from dsdpo.engine.build import device
    from dsdpo.run.models import build_policy_and_reference
    from dsdpo.run.plan import plan_run

    plan = plan_run(RunConfig.model_validate(run))
    policy, reference = build_policy_and_reference(plan)
    return policy, reference, list(plan.training_windows(device()))


@pytest.mark.parametrize("policy", ["zero2", "zero3", "zero3_offload"])
def test_the_frozen_adapter_is_saved_as_itself(policy: str, inputs: Path, tmp_path: Path) -> None:
    """Saved, overwritten in memory, loaded: the reference answers as before, and nothing like the trained adapter."""
    fields = {"modules_to_save": ["lm_head"]}
    run = lora_run(tmp_path, inputs, {"path": continued_adapter(tmp_path, inputs, **fields)}, policy_zero=policy)
    run["train"] = {"max_steps": 2}
    # Small parameters are kept whole by ZeRO-3, as in real runs: they must not outlive the load.
    config = json.loads(Path(run["deepspeed"]).read_text())
    if policy.startswith("zero3"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    run["deepspeed"] = write_json(tmp_path / "persistent.json", config)
    for answers in run_ranks(2, save_and_load_here, run, str(tmp_path / "saved")):
        assert answers["changed"] > 0.1
        assert answers["loaded"] == 0.0
        assert answers["trained"] > 1e-2
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["adapter.safetensors"]


def save_and_load_here(run: dict[str, Any], folder: str) -> dict[str, float]:
    """How far the reference's answer is from its first one: after a step, after a change, and after loading."""
    from dsdpo.config.loss import LossConfig
    from dsdpo.engine.lora import adapter_pairs
    from dsdpo.engine.shards import release_gathered, writable_shard
    from dsdpo.objective.logps import pair_logps
    from dsdpo.training.metrics import Meter
    from dsdpo.training.step import train_step
    from dsdpo.training.step_loss import StepLoss

    policy, reference, windows = build_here(run)
    batch = windows[0].batches[0]

    def answer() -> torch.Tensor:
        return reference.score([batch])[0].chosen

    first = answer()
    for window in windows:
        train_step(policy, reference.score(window.batches), StepLoss(LossConfig()), window, Meter())
    assert torch.equal(answer(), first), "the reference moved with the policy"
    if (state := reference.state()) is not None:
        state.write(Path(folder))
    torch.distributed.barrier()
    with torch.no_grad():
        trained_away = float((pair_logps(policy, batch).chosen - first).abs().max())
    release_gathered(policy)
    for _, _, parameter in adapter_pairs(policy.module.lm):
        with torch.no_grad(), writable_shard(parameter) as (shard, _start):
            shard.mul_(3.0)
    changed = answer()
    reference.load(Path(folder))
    far = {"changed": changed, "loaded": answer()}
    return {"trained": trained_away, **{name: float((value - first).abs().max()) for name, value in far.items()}}
