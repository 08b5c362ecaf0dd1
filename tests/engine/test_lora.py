"""Adapters as trained weights: their dtype, what is refused, exported folders and checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsdpo.config.model import ModelConfig
from dsdpo.engine.blank import blank_lm
from dsdpo.engine.lora import (
    POLICY,
    REFERENCE,
    AdapterSwitch,
    adapter_pairs,
    add_adapter,
    add_reference_adapter,
    check_adapter_fits,
)
from dsdpo.errors import ConfigError
from dsdpo.objective.logps import ResponseScorer, pair_logps
from tests.adapters import continued_adapter
from tests.ranks import run_ranks
from tests.reference.test_adapter import build_here, lora_run, tie_embeddings
from tests.tiny import plain_logps, random_batch, random_pairs, tiny_lm


def adapted(lora: dict[str, Any], **options: Any) -> Any:
    """A tiny model with a fresh adapter."""
    return add_adapter(tiny_lm(**options), ModelConfig(path="m", lora=lora), seed=0)


def test_trains_the_adapter_and_nothing_else() -> None:
    lm = adapted({"r": 2, "target_modules": ["q_proj"], "lora_alpha": 6, "use_rslora": True})
    trained = [name for name, parameter in lm.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4  # two layers, A and B
    assert all("q_proj.lora_" in name for name in trained)
    layer = lm.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling[POLICY] == pytest.approx(6 / 2**0.5)


def test_the_seed_decides_the_adapter_alone() -> None:
    """Neither what was drawn before nor later draws are touched."""
    torch.manual_seed(1)
    first = dict(adapted({"r": 2}).named_parameters())
    torch.manual_seed(2)
    lm = tiny_lm()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    second = dict(add_adapter(lm, ModelConfig(path="m", lora={"r": 2}), seed=0).named_parameters())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_linear_layers_but_the_head() -> None:
    names = {name.split(".lora_A")[0] for name, _ in adapted({"r": 2}).named_parameters() if "lora_A" in name}
    assert {name.split(".")[-1] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    "lora", [{"r": 2, "target_modules": ["no_such"]}, {"modules_to_save": [], "target_modules": "x"}]
)
def test_modules_that_are_not_there_are_refused(lora: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules .* does not fit m: "):
        adapted(lora)


def test_they_are_refused_before_the_model_loads(inputs: Path, tmp_path: Path) -> None:
    """Its weights are not even there."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for saved in (None, ["embed_tokens", "lm_head"]):
        fits = ModelConfig(path=str(tmp_path / "model"), lora={"r": 4, "use_dora": True, "modules_to_save": saved})
        check_adapter_fits(blank_lm(fits), fits)
    unfit = ModelConfig(path=str(tmp_path / "model"), lora={"target_modules": ["nope"]})
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules: nope is no part of"):
        check_adapter_fits(blank_lm(unfit), unfit)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_a_whole_adapter_of_any_kind_is_taken(options: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    model = str(inputs / "model")
    lm = AutoModelForCausalLM.from_pretrained(model)
    add_adapter(lm, ModelConfig(path=model, lora={"r": 2, **options}), seed=0).save_pretrained(tmp_path)
    again = ModelConfig(path=model, lora={"path": str(tmp_path)})
    check_adapter_fits(blank_lm(again), again)


def test_a_head_that_only_the_model_shows_is_refused() -> None:
    """Its name is not always one of those that the settings are checked for."""
    lm = tiny_lm()

    class OtherName(type(lm)):  # type: ignore[misc]
        def get_output_embeddings(self) -> torch.nn.Module:
            return self.last

    lm.last = lm.lm_head
    del lm.lm_head
    lm.__class__ = OtherName
    with pytest.raises(ConfigError, match=r"output head .* modules_to_save"):
        add_adapter(lm, ModelConfig(path="m", lora={"target_modules": ["q_proj", "last"]}), seed=0)


def test_reference_adapter_is_a_frozen_copy_without_dropout() -> None:
    lm = adapted({"r": 2, "lora_dropout": 0.5, "modules_to_save": ["embed_tokens"]})
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    add_reference_adapter(lm)
    pairs = adapter_pairs(lm)
    assert sum("embed_tokens" in name for name, _, _ in pairs) == 1
    for name, ours, copied in pairs:
        assert torch.equal(ours, copied), name
        assert ours.requires_grad, name
        assert not copied.requires_grad, name
    scorer, batch = ResponseScorer(lm).train(), random_batch()
    switch = AdapterSwitch(lm)
    with switch.use(REFERENCE), torch.no_grad():
        first, second = (pair_logps(scorer, batch).chosen for _ in range(2))
    assert torch.equal(first, second), "dropout in the reference"
    with torch.no_grad():
        assert not torch.equal(pair_logps(scorer, batch).chosen, first), "no dropout in training"


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("tied", [False, True])
def test_switched_off_it_is_the_model_that_it_was(saved: list[str] | None, tied: bool) -> None:
    pairs, batch = random_pairs(3), random_batch()
    expected = plain_logps(tiny_lm(tie_word_embeddings=tied), pairs)
    lm = adapted({"r": 2, "modules_to_save": saved}, tie_word_embeddings=tied)
    scorer = ResponseScorer(lm)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        changed = pair_logps(scorer, batch)
        with AdapterSwitch(lm).use(None):
            bare = pair_logps(scorer, batch)
        own = plain_logps(lm, pairs)
    torch.testing.assert_close((bare.chosen, bare.rejected), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((changed.chosen, changed.rejected), own, rtol=1e-5, atol=1e-4)
    assert (changed.chosen - bare.chosen).abs().max() > 0.1


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["model.embed_tokens", "lm_head"]])
def test_tied_embeddings_are_trained_as_one_matrix(saved: list[str]) -> None:
    lm = adapted({"r": 2, "modules_to_save": saved}, tie_word_embeddings=True)
    matrices = [parameter for parameter in lm.parameters() if parameter.requires_grad and parameter.shape[0] == 97]
    assert len(matrices) == 1
    ResponseScorer(lm)(batch=random_batch()).sum().backward()
    both = matrices[0].grad
    assert both is not None
    # Embedding rows of tokens that no sequence holds get a gradient from the head alone.
    assert (both.abs().sum(1) > 0).all()


@pytest.mark.parametrize("policy", ["zero1", "zero3"])
def test_exported_adapter_and_merged_model_are_the_policy(policy: str, inputs: Path, tmp_path: Path) -> None:
    check_export(tmp_path, inputs, {"r": 4, "lora_alpha": 16}, policy)


@pytest.mark.parametrize("tied", [False, True])
def test_exported_whole_modules(tied: bool, inputs: Path, tmp_path: Path) -> None:
    inputs = tie_embeddings(inputs, tmp_path / "inputs") if tied else inputs
    check_export(tmp_path, inputs, {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}, "zero3")


def test_exported_dora_that_went_on(inputs: Path, tmp_path: Path) -> None:
    """The frozen copy is no part of the export."""
    check_export(tmp_path, inputs, {"path": continued_adapter(tmp_path, inputs, use_dora=True)}, "zero3")


def check_export(folder: Path, inputs: Path, lora: dict[str, Any], policy: str) -> None:
    """Train, export, load with peft and transformers alone, and compare log-probs."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Padded, as transformers' own attention takes it.
    padded = {"layout": "padded"}
    run = lora_run(folder, inputs, lora, policy_zero=policy, export={"merge_adapter": True}, data=padded)
    run["train"] = {"max_steps": 2}
    [(batch, expected, moved), _] = run_ranks(2, train_and_export_here, run)
    assert moved > 1e-2, "the policy is still the reference"
    model, merged = folder / "run" / "model", folder / "run" / "merged"
    names = {path.name for path in model.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "README.md"} <= names
    assert not any(path.is_dir() for path in model.iterdir())
    settings = json.loads((model / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((inputs / "model").resolve())
    assert settings["inference_mode"]
    assert "library_name: peft" in (model / "README.md").read_text()
    assert "library_name: transformers" in (merged / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    loaded = peft.PeftModel.from_pretrained(base, model)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    AutoTokenizer.from_pretrained(merged)
    for lm in (loaded, whole):
        with torch.no_grad():
            found = pair_logps(ResponseScorer(lm.eval()), batch)
        torch.testing.assert_close(found.chosen, expected, rtol=1e-5, atol=1e-5)


def train_and_export_here(run: dict[str, Any]) -> tuple[Any, torch.Tensor, float]:
    """A batch, the trained policy's log-probs of it, and how far they are from the reference's."""
    from dsdpo.config.loss import LossConfig
    from dsdpo.config.run import RunConfig
    from dsdpo.data.tokenizer import load_tokenizer
    from dsdpo.training.export import export_model
    from dsdpo.training.metrics import Meter
    from dsdpo.training.step import train_step
    from dsdpo.training.step_loss import StepLoss

    policy, reference, windows = build_here(run)
    for window in windows:
        train_step(policy, reference.score(window.batches), StepLoss(LossConfig()), window, Meter())
    policy.eval()
    batch = windows[0].batches[0]
    with torch.no_grad():
        logps = pair_logps(policy, batch).chosen
    moved = float((logps - reference.score([batch])[0].chosen).abs().max())
    settings = RunConfig.model_validate(run)
    folder = Path(settings.output_dir) / "model"
    export_model(policy, load_tokenizer(settings.model), settings, folder, metrics={})
    return batch, logps, moved


@pytest.mark.parametrize("policy", ["zero2", "zero3", "zero3_offload"])
def test_checkpoint_leaves_the_base_out_and_goes_on(policy: str, inputs: Path, tmp_path: Path) -> None:
    """Saved after two of four steps and loaded into fresh engines, the last two steps are the same."""
    run = lora_run(tmp_path, inputs, {"r": 4}, policy_zero=policy)
    for whole, resumed, size, base in run_ranks(2, save_and_resume_here, run, str(tmp_path / "checkpoints")):
        # DeepSpeed's CPU Adam multiplies its bias corrections up step by step and takes them as powers after loading.
        assert resumed == (pytest.approx(whole, abs=1e-6) if policy == "zero3_offload" else whole)
        assert size < base / 2, "frozen weights are in the checkpoint"


def save_and_resume_here(run: dict[str, Any], folder: str) -> tuple[list[float], list[float], int, int]:
    """Losses of the last steps, uninterrupted and resumed, and bytes of the checkpoint's weights and of the base."""
    from dsdpo.config.loss import LossConfig
    from dsdpo.distributed import barrier, rank
    from dsdpo.engine.shards import parameter_count
    from dsdpo.training.checkpoint import Retention, TrainState
    from dsdpo.training.metrics import Meter
    from dsdpo.training.saving import begin_checkpoint, finish_checkpoint
    from dsdpo.training.step import train_step
    from dsdpo.training.step_loss import StepLoss

    loss_fn = StepLoss(LossConfig())

    def steps(policy: Any, reference: Any, windows: list[Any]) -> list[float]:
        found = []
        for window in windows:
            meter = Meter()
            train_step(policy, reference.score(window.batches), loss_fn, window, meter)
            found.append(meter.read()["loss"])
        return found

    policy, reference, windows = build_here(run)
    steps(policy, reference, windows[:2])
    parts = {"policy": policy, "reference": reference, "meter": Meter(), "record": {}}
    path = finish_checkpoint(begin_checkpoint(Path(folder), TrainState(2, 16), **parts), Retention(last=1))
    whole = steps(policy, reference, windows[2:])
    barrier()
    fresh, fresh_reference, windows = build_here(run)
    fresh.load_checkpoint(str(path), tag="policy", load_module_strict=False)
    resumed = steps(fresh, fresh_reference, windows[2:])
    stored = sum(file.stat().st_size for file in path.rglob("*model_states.pt")) if rank() == 0 else 0
    return whole, resumed, stored, 4 * parameter_count(fresh.module)


@pytest.mark.parametrize("policy", ["zero1", "zero2", "zero3"])
def test_bfloat16_loses_no_small_update(policy: str, inputs: Path, tmp_path: Path) -> None:
    """The adapter has the model's dtype under every stage; steps too small for it add up in float32 masters."""
    run = lora_run(tmp_path, inputs, {"r": 4}, policy_zero=policy, model={"dtype": "bfloat16"})
    run["train"], run["optimizer"] = {"max_steps": 1}, {"learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    for dtypes, moved in run_ranks(2, master_here, run):
        assert dtypes == {"torch.bfloat16"}
        # Adam's first step is the learning rate, a hundredth of bfloat16's resolution at lora_A's scale of 0.1.
        assert moved == pytest.approx(1e-6, rel=0.05)


def master_here(run: dict[str, Any]) -> tuple[set[str], float]:
    """The adapter's dtypes, and the median change of a lora_B's float32 master after one step."""
    from deepspeed.utils import safe_get_full_fp32_param

    from dsdpo.config.loss import LossConfig
    from dsdpo.training.metrics import Meter
    from dsdpo.training.step import train_step
    from dsdpo.training.step_loss import StepLoss

    policy, reference, [window] = build_here(run)
    factors = {name: p for name, p in policy.module.named_parameters() if "lora_" in name}
    parameter = next(p for name, p in factors.items() if "lora_B" in name)
    before = safe_get_full_fp32_param(parameter).clone()
    train_step(policy, reference.score(window.batches), StepLoss(LossConfig()), window, Meter())
    change = (safe_get_full_fp32_param(parameter) - before).abs()
    return {str(p.dtype) for p in factors.values()}, float(change.median())
