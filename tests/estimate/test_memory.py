"""The model of bytes: by hand for a few parameters, and against the model's own tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from dsdpo.config.run import ModelConfig
from dsdpo.engine.lora import POLICY
from dsdpo.engine.quantization import loading_options, scales
from dsdpo.engine.shards import full_shape
from dsdpo.estimate.activations import PassSize, by_formula, rehearse
from dsdpo.estimate.gathers import Gathers, gathers_of
from dsdpo.estimate.memory import (
    FLOAT32,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    optimizer_states,
    policy_memory,
    reference_memory,
)
from dsdpo.estimate.weights import Blank, Part, Weights, blank_model
from dsdpo.objective.flops import model_flops

HIDDEN, LAYERS, VOCABULARY, INNER = 64, 3, 512, 160
FEW = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
FEW["stage3_param_persistence_threshold"] = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with nothing but its config.json."""
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    return str(path)


def blank(folder: str, **settings: Any) -> Blank:
    return blank_model(ModelConfig(path=folder, **settings), layout="packed", trains=True)


# A Llama's matrices: q and o, k and v, gate, up and down; two norms a layer and one at the end; embeddings once.
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INNER
ALL = VOCABULARY * HIDDEN + LAYERS * (LAYER + 2 * HIDDEN) + HIDDEN


def test_parameters_are_counted_once_and_by_what_trains(folder: str) -> None:
    assert blank(folder).weights.total() == blank(folder).weights.total(trained=True) == ALL
    adapted = blank(folder, lora={"r": 4, "target_modules": ["q_proj", "down_proj"]}).weights
    assert adapted.total(trained=False) == ALL
    assert adapted.total(trained=True) == LAYERS * 4 * (HIDDEN + HIDDEN + INNER + HIDDEN)


@pytest.mark.parametrize(("double", "storage"), [(True, "model"), (False, "model"), (True, "uint8")])
def test_weights_in_4_bits_take_what_bitsandbytes_holds(folder: str, double: bool, storage: str) -> None:
    pytest.importorskip("bitsandbytes")
    bits = {"bits": 4, "double": double, "storage_dtype": storage}
    model = ModelConfig(path=folder, lora={"r": 4}, quantization=bits)
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).save_pretrained(
            f"{folder}/weights"
        )
    real = AutoModelForCausalLM.from_pretrained(f"{folder}/weights", dtype=torch.bfloat16, **loading_options(model))
    held = sum(parameter.numel() * parameter.element_size() for parameter in real.parameters())
    of_scales = sum(scale.numel() * scale.element_size() for name, scale in scales(real) if "offset" not in name)
    found = blank(folder, lora={"r": 4}, quantization=bits).weights
    assert found.itemsize * found.total(trained=False) == held
    assert found.scales == of_scales
    assert held < 2 * ALL / 2, "nothing is packed"
    of_adapter = 2 * 2 * HIDDEN + 2 * (HIDDEN + HIDDEN // 2) + 3 * (HIDDEN + INNER)
    assert found.total(trained=True) == LAYERS * 4 * of_adapter


def test_a_rehearsal_does_not_depend_on_what_the_process_did_before(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the look at the DeepSpeed JSONs, in which a toy engine is built under ZeRO-3."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    size = PassSize(rows=1, width=8, scored=4, keys=8)
    lm = blank(folder, lora={"r": 4}, gradient_checkpointing=False).lm
    expected = rehearse(lm, size, chunk=4, trains=True)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    assert rehearse(lm, size, chunk=4, trains=True) == expected
    assert torch.nn.functional.linear is zero3_linear_wrap


def test_a_packed_weight_is_unpacked_for_its_product_and_not_kept(folder: str) -> None:
    size = PassSize(rows=1, width=8, scored=4, keys=8)
    plain, packed = (
        rehearse(blank(folder, lora={"r": 4, "target_modules": ["q_proj"]}, gradient_checkpointing=False, **more).lm,
                 size, chunk=4, trains=True)
        for more in ({}, {"quantization": {"bits": 4}})
    )  # fmt: skip
    assert packed.kept == plain.kept
    unpacked = 2 * HIDDEN * INNER  # the largest: an MLP's matrix in bfloat16
    assert unpacked < packed.layers <= plain.layers + unpacked
    ours, theirs = (model_flops(blank(folder, lora={"r": 4}, **more).lm, adapter=POLICY, shape_of=full_shape)
                    for more in ({}, {"quantization": {"bits": 4}}))  # fmt: skip
    assert ours == theirs, "operations are those of the weights that the bits stand for"


def test_norms_of_liger_keep_no_copies_in_float32(folder: str) -> None:
    size = PassSize(rows=1, width=100, scored=4, keys=100)
    own, fused = (
        rehearse(blank(folder, gradient_checkpointing=False, **more).lm, size, chunk=4, trains=True)
        for more in ({}, {"use_liger_kernel": True})
    )
    # Of each norm transformers keeps the input in float32 and the scaled input, Liger the input as it is.
    norms, hidden = 2 * LAYERS + 1, 100 * HIDDEN
    assert own.kept - fused.kept == norms * (4 + 2 - 2) * hidden
    assert own.layers - fused.layers > 2 * 4 * hidden, "gradients in float32 come and go"


def parts(*sizes: int, blocks: tuple[int | None, ...]) -> Weights:
    return Weights(tuple(Part((size,), (True,), block) for size, block in zip(sizes, blocks, strict=True)), 2)


@pytest.mark.parametrize(
    ("stage", "sums", "held"),
    [
        # 1,000 elements on 4 ranks: 12 bytes of Adam and master weight, of a quarter each.
        (1, "fp32", {WEIGHTS: 2000, OPTIMIZER: 3000, GRADIENTS: 4000}),  # whole sums in float32
        (1, "bf16", {WEIGHTS: 2000, OPTIMIZER: 3000}),
        (2, "fp32", {WEIGHTS: 2000, OPTIMIZER: 3000}),
        (3, "fp32", {WEIGHTS: 500, OPTIMIZER: 3000, GRADIENTS: 1000}),
        (3, "bf16", {WEIGHTS: 500, OPTIMIZER: 3000, GRADIENTS: 500}),
    ],
)
def test_what_stages_hold(stage: int, sums: str, held: dict[str, int]) -> None:
    config = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": sums},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 0, "stage3_param_persistence_threshold": 0},
    }
    found = policy_memory(config, parts(600, 400, blocks=(0, 1)), ranks=4, checkpointing=True)
    sizes = {part: size for (part, place), size in found.held.items() if place == "device" and size}
    assert sizes == held
    if stage == 2:  # a quarter of the sums, from the first backward pass to the update
        assert found.training[GRADIENTS, "device"] == 1000


def test_offload_moves_weights_and_states_to_the_host() -> None:
    cpu = {"device": "cpu"}
    zero = {"stage": 3, "offload_param": cpu, "offload_optimizer": cpu, "reduce_bucket_size": 0}
    config = {"bf16": {"enabled": True}, "zero_optimization": {**zero, "stage3_param_persistence_threshold": 0}}
    found = policy_memory(config, parts(600, 400, blocks=(0, 1)), ranks=4, checkpointing=True)
    # Of 250 elements: 2 of weights, 12 of Adam, 4 of gradients for it and 2 of their sums.
    host = {part: size for (part, place), size in found.held.items() if place == "host"}
    assert host == {WEIGHTS: 500, OPTIMIZER: 3000, GRADIENTS: 1500}
    assert not any(size for (_, place), size in found.held.items() if place == "device")
    reference = reference_memory({"zero_optimization": {"stage": 0}}, parts(600, 400, blocks=(0, 1)), ranks=4)
    assert reference.held == {(WEIGHTS, "device"): 2000}


def test_gathers_with_nothing_kept() -> None:
    weights = parts(100, 30, 40, 20, blocks=(None, 0, 0, None))
    # Forward 190; backward 20, the layer again 30 + 40, backward 40 (kept from just before: not), 30, then 100.
    assert gathers_of(weights, FEW, backward=False) == Gathers(100, 0, 190, 100, 4)
    assert gathers_of(weights, FEW, backward=True).received == 2 * 190
    assert gathers_of(weights, FEW, backward=True, checkpointing=True).received == 2 * 190 + 70


def test_gathers_that_are_kept() -> None:
    weights = parts(100, 30, 40, 20, blocks=(None, 0, 0, None))
    all_live = gathers_of(weights, {"stage3_param_persistence_threshold": 0}, backward=True)
    assert (all_live.live, all_live.received) == (190, 190)  # one gather serves forward and backward
    assert all_live.calls == 2  # the first part's, and all others' ahead of their use
    assert gathers_of(weights, {**FEW, "stage3_param_persistence_threshold": 35}, backward=False) == Gathers(
        100, 50, 140, 100, 2
    )


def test_checkpointing_keeps_the_input_of_each_layer(folder: str) -> None:
    size = PassSize(1, 1024, 256, 1200)
    kept = rehearse(blank(folder).lm, size, chunk=64, trains=True)
    inputs = 2 * size.tokens * HIDDEN * LAYERS
    # Beside them what the last norm keeps in float32 and the tables of positions.
    assert inputs <= kept.kept <= inputs + 12 * size.tokens * HIDDEN
    whole = rehearse(blank(folder, gradient_checkpointing=False).lm, size, chunk=64, trains=True)
    assert whole.kept > LAYERS * 2 * size.tokens * (4 * INNER + 6 * HIDDEN)
    assert kept.kept + kept.layers < whole.kept + whole.layers


def test_rehearsal_counts_what_autograd_saves(folder: str) -> None:
    """Without checkpointing, beside the storages that torch itself keeps for the same pass on real tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    own = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = lm.model(input_ids=torch.zeros(1, 1024, dtype=torch.int64), use_cache=False).last_hidden_state
    size = PassSize(1, 1024, 256, 1024)
    found = rehearse(blank(folder, gradient_checkpointing=False).lm, size, chunk=64, trains=True)
    assert found.kept == pytest.approx(sum(saved.values()) + hidden.numel() * 2, rel=0.15)


def test_the_head_takes_a_chunk_of_logits_and_a_float32_gradient(folder: str) -> None:
    found = rehearse(blank(folder).lm, PassSize(1, 128, 100, 128), chunk=50, trains=True)
    weight = VOCABULARY * HIDDEN
    # Chunk: logits in bfloat16 and float32, their exponentials; gradients of hidden states; of the weight, twice.
    assert found.head >= 4 * weight + 50 * VOCABULARY * 8
    assert found.head <= 6 * weight + 50 * VOCABULARY * 20 + 8 * 128 * HIDDEN
    frozen = rehearse(blank(folder, lora={"r": 4}).lm, PassSize(1, 128, 100, 128), chunk=50, trains=True)
    assert frozen.head < found.head - 3 * weight


def test_activations_on_the_host(folder: str) -> None:
    size = PassSize(1, 1024, 256, 1024)
    lm = blank(folder).lm
    there, away = (rehearse(lm, size, chunk=64, trains=True, kept_on_host=moved) for moved in (False, True))
    assert away.on_host >= 2 * size.tokens * HIDDEN * LAYERS
    assert away.kept < there.kept


def test_formula_for_models_that_cannot_be_rehearsed(folder: str) -> None:
    size = PassSize(1, 2048, 256, 2048)
    for checkpointing in (True, False):
        lm = blank(folder, gradient_checkpointing=checkpointing).lm
        real, guessed = rehearse(lm, size, chunk=64, trains=True), by_formula(lm, size, chunk=64, trains=True)
        assert guessed.peak == pytest.approx(real.peak, rel=0.4)


@pytest.mark.parametrize(
    ("block", "per_weight"),
    [
        ({"type": "SGD", "params": {"momentum": 0.0}}, 0),
        ({"type": "SGD", "params": {"momentum": 0.9}}, 4),
        ({"type": "Lion", "params": {}}, 4),
        ({"type": "adamw_8bit", "params": {}}, 2 + 2 * 4 / 256),
        ({"type": "AdamW", "params": {}}, 8),
    ],
)
def test_states_of_each_optimizer_are_those_that_it_keeps(block: dict[str, Any], per_weight: float) -> None:
    from bitsandbytes.optim import AdamW8bit, Lion32bit

    config = {"zero_optimization": {"stage": 2}, "optimizer": block}
    assert FLOAT32 * optimizer_states(config) == per_weight
    kinds = {"SGD": torch.optim.SGD, "Lion": Lion32bit, "adamw_8bit": AdamW8bit, "AdamW": torch.optim.AdamW}
    flat = torch.nn.Parameter(torch.ones(25_600))
    flat.grad = torch.ones_like(flat)
    optimizer = kinds[block["type"]]([flat], lr=1e-3, **block["params"])
    optimizer.step()
    kept = [value.nbytes for value in optimizer.state[flat].values() if isinstance(value, torch.Tensor) and value.dim()]
    tables = 2 * 256 * FLOAT32 if block["type"] == "adamw_8bit" else 0  # of what the 8 bits stand for, once
    assert sum(kept) - tables == per_weight * flat.numel()


def test_muon_keeps_one_number_for_each_weight_of_the_layers() -> None:
    """Of 16-bit weights as DeepSpeed 0.19 was seen to: momentum and its copy in bfloat16 at stages 1 and 2."""
    cpu = {"offload_optimizer": {"device": "cpu"}}
    fp32_sums = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}

    def states(itemsize: int, stage: int, offload: dict[str, Any] | None = None, **more: Any) -> float:
        weights = replace(parts(300, 500, 200, blocks=(None, 0, None)), itemsize=itemsize)  # 500 of 1,000 are of layers
        config = {"zero_optimization": {"stage": stage, **(offload or {})}, "optimizer": {"type": "Muon"}, **more}
        return optimizer_states(config, weights)

    assert states(2, 2) == states(2, 1) == 0.5 * 2 / 2 + 0.5 * 2
    assert states(4, 2) == 0.5 * 2 + 0.5 * 2
    assert states(2, 1, **fp32_sums) == states(2, 3) == states(2, 2, cpu) == 0.5 + 0.5 * 2
