"""Models, adapters and references that are not what a run needs: name, what the message says, settings, and the change.

A change gets a folder in which `model` is a copy of the demo's model, whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path], None]


def tensors(change: Callable[[dict[str, Any]], Any], name: str = "model/model.safetensors") -> Change:
    """The tensors of a weights file, changed in place."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / name)
        change(held)
        save_file({key: value.clone() for key, value in held.items()}, folder / name, {"format": "pt"})

    return apply


def zero_size(held: dict[str, Any]) -> None:
    held[UP] = held[UP].new_empty(0)


def whole_numbers(held: dict[str, Any]) -> None:
    import torch

    held[UP] = held[UP].to(torch.int8)


def index_that_lies(folder: Path) -> None:
    """The one weights file as the first shard of an index, which names a tensor that it does not hold."""
    model = folder / "model"
    (model / "model.safetensors").rename(model / "model-00001.safetensors")
    places = {"weight_map": {"absent.weight": "model-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(places))


def index_of_numbers(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "model-00001.safetensors")
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": 1}}))


def another_head(held: dict[str, Any]) -> None:
    held["lm_head.weight"] = held["model.embed_tokens.weight"] * 2


def renamed(how: Callable[[str], str]) -> Callable[[dict[str, Any]], None]:
    def change(held: dict[str, Any]) -> None:
        for name in list(held):
            held[how(name)] = held.pop(name)

    return change


def config(**values: Any) -> Change:
    """Values of the model's config.json, replaced."""

    def apply(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def content(data: bytes | None, *, first: int | None = None) -> Change:
    """The weights file with other bytes, or its `first` ones."""

    def apply(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:first] if data is None else data)

    return apply


def appended(folder: Path) -> None:
    with (folder / "model" / "model.safetensors").open("ab") as file:
        file.write(b"more")


def text(name: str, content: str) -> Change:
    """A file of the model with another text."""

    def apply(folder: Path) -> None:
        (folder / "model" / name).write_text(content)

    return apply


def other_kind(**values: Any) -> Change:
    """A config.json of another kind of model; the weights do not come into it."""

    def apply(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(values))

    return apply


def adapter(change: Callable[[dict[str, Any]], Any]) -> Change:
    """A LoRA adapter in `adapter`, its tensors changed."""

    def apply(folder: Path) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        lm = AutoModelForCausalLM.from_pretrained(folder / "model")
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(lm, settings).save_pretrained(folder / "adapter")
        tensors(change, "adapter/adapter_model.safetensors")(folder)

    return apply


def drop_half(held: dict[str, Any]) -> None:
    for name in sorted(held)[::2]:
        del held[name]


def moved(to: str, *, beside: str | None = None) -> Change:
    """The model in another folder below the case's, with an empty file `beside` it."""

    def apply(folder: Path) -> None:
        (folder / to).parent.mkdir(parents=True)
        (folder / "model").rename(folder / to)
        if beside:
            (folder / beside).parent.mkdir(parents=True, exist_ok=True)
            (folder / beside).write_text("{}")

    return apply


def reference(change: Change) -> Change:
    """A copy of the model in `reference`, changed as if it were the model."""

    def apply(folder: Path) -> None:
        import shutil

        inner = folder / "inner"
        inner.mkdir()
        shutil.copytree(folder / "model", inner / "model")
        change(inner)
        (inner / "model").rename(folder / "reference")

    return apply


def swap_tokens(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    held = json.loads(path.read_text())
    words = held["model"]["vocab"]
    one, other = list(words)[10:12]
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(held))


def fewer_embeddings(folder: Path) -> None:
    config(vocab_size=40)(folder)

    def cut(held: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in held:
                held[name] = held[name][:40]

    tensors(cut)(folder)


def unchanged(folder: Path) -> None:
    """Nothing but a copy of the model."""


T5 = {"model_type": "t5", "vocab_size": 67, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
BERT = {"model_type": "bert", "vocab_size": 67, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
ADAPTER: dict[str, Any] = {"model": {"lora": {"path": "adapter"}}}
REFERENCE: dict[str, Any] = {"reference": {"path": "reference"}}
BYTES: dict[str, Any] = {"model": {"chat_template": "model/model.safetensors"}}
DRY = ("--dry-run",)

Row = tuple[str, tuple[str, ...], dict[str, Any], tuple[str, ...], Change]
UNFIT: list[Row] = [
    ("missing tensor", ("model.path", f"missing: {UP};"), {}, DRY, tensors(lambda held: held.pop(UP))),
    ("tensor without elements", (f"of another shape: {UP} [0] where",), {}, DRY, tensors(zero_size)),
    (
        "tensor left over",
        ("not of a LlamaForCausalLM: model.layers.9.x",),
        {},
        DRY,
        tensors(lambda held: held.update({"model.layers.9.x": held[UP]})),
    ),
    ("more layers than weights", ("missing: model.layers.2.", "more"), {}, DRY, config(num_hidden_layers=3)),
    ("other sizes than config.json", ("of another shape: ", "where"), {}, DRY, config(intermediate_size=40)),
    (
        "names with a prefix",
        ("missing: ", "not of a LlamaForCausalLM: module.model."),
        {},
        DRY,
        tensors(renamed(lambda name: f"module.{name}")),
    ),
    ("weights cut off", ("is cut off: it has 20,000 bytes of",), {}, DRY, content(None, first=20000)),
    ("empty weights file", ("(0 bytes) is no safetensors file",), {}, DRY, content(b"")),
    ("junk for weights", ("(4,000 bytes) is no safetensors file",), {}, DRY, content(b"\xff" * 4000)),
    ("git-lfs pointer", ("is a git-lfs pointer",), {}, DRY, content(b"version https://git-lfs.github.com/spec/v1\n")),
    (
        "quantized weights",
        ("stored quantized", "bitsandbytes", "give the model that they were made from"),
        {},
        DRY,
        config(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}),
    ),
    ("quantized weights of MLX", ("stored quantized (quantization: ",), {}, DRY, config(quantization={"bits": 4})),
    (
        "quantization that is a list",
        ("stored quantized (quantization_config: ",),
        {},
        DRY,
        config(quantization_config=["x"]),
    ),
    ("whole numbers for weights", (f"stores {UP} (I8): quantized weights",), {}, DRY, tensors(whole_numbers)),
    ("index of other shards", ("says that model-00001.safetensors holds absent.weight",), {}, DRY, index_that_lies),
    ("index of numbers", ("weight_map puts tensors into 1)",), {}, DRY, index_of_numbers),
    ("weights with more behind them", ("is not what its header says: it has",), {}, DRY, appended),
    (
        "a head of its own where config.json ties it",
        ("lm_head.weight and model.embed_tokens.weight one tensor", "set tie_word_embeddings to false"),
        {},
        DRY,
        tensors(another_head),
    ),
    ("config.json that is a list", ("config.json holds no settings",), {}, DRY, text("config.json", "[]")),
    (
        "empty block of quantization",
        ("stored quantized (quantization_config: unn",),
        {},
        DRY,
        config(quantization_config={}),
    ),
    ("activation that there is not", ("no 'foo' is known; correct it",), {}, DRY, config(hidden_act="foo")),
    (
        "no position at all",
        ("has max_position_embeddings -4; correct it",),
        {},
        DRY,
        config(max_position_embeddings=-4),
    ),
    (
        "tokenizer that encodes nothing",
        ("no tokenizer could be loaded", "'>' not supported"),
        {},
        DRY,
        text("tokenizer_config.json", json.dumps({"model_max_length": "x"})),
    ),
    ("chat template of bytes", ("model.chat_template", "cannot be read as text"), BYTES, DRY, unchanged),
    ("norm of NaN", ("no response of a sample has a finite log-prob",), {}, (), config(rms_norm_eps=float("nan"))),
    ("encoder-decoder", ("is an encoder-decoder (t5)",), {}, DRY, other_kind(**T5)),
    ("model that sees all tokens", ("(bert) sees the tokens",), {}, DRY, other_kind(**BERT)),
    (
        "head of a masked language model",
        ("missing: ", "BertLMHeadModel"),
        {},
        DRY,
        other_kind(**BERT, is_decoder=True, architectures=["BertLMHeadModel"]),
    ),
    ("no language model", ("(vit) is no causal language model",), {}, DRY, other_kind(model_type="vit")),
    (
        "sizes that no model can have",
        ("of attention heads (5)",),
        {},
        DRY,
        config(num_attention_heads=5),
    ),
    ("run folder for a model", ("give the model in it",), {"model": {"path": "run"}}, DRY, moved("run/model")),
    (
        "checkpoint for a model",
        ("it is a checkpoint", "--checkpoint.resume"),
        {"model": {"path": "run/checkpoints/step-000100"}},
        DRY,
        moved("run/model", beside="run/checkpoints/step-000100/state.json"),
    ),
    (
        "adapter for a model",
        ("holds an adapter", "model.lora.path"),
        {"model": {"path": "adapter"}},
        DRY,
        adapter(lambda held: None),
    ),
    (
        "adapter for a reference",
        ("reference.path", "holds an adapter"),
        {"reference": {"path": "adapter"}},
        DRY,
        adapter(lambda held: None),
    ),
    ("empty adapter", ("model.lora.path", "holds no weights"), ADAPTER, DRY, adapter(lambda held: held.clear())),
    ("half an adapter", ("model.lora.path", "missing: base_model."), ADAPTER, DRY, adapter(drop_half)),
    (
        "adapter under other names",
        ("model.lora.path", "not of a LoRA on it: x.base_model"),
        ADAPTER,
        DRY,
        adapter(renamed(lambda name: f"x.{name}")),
    ),
    ("reference with a hole", ("reference.path", UP), REFERENCE, DRY, reference(tensors(lambda held: held.pop(UP)))),
    (
        "reference with other tokens",
        ("is not the policy's", "allow_other_tokenizer"),
        REFERENCE,
        DRY,
        reference(swap_tokens),
    ),
    ("reference with fewer embeddings", ("has 40 embeddings, but",), REFERENCE, DRY, reference(fewer_embeddings)),
    (
        "unknown attention",
        ("model.attn_implementation: foo cannot be used",),
        {"model": {"attn_implementation": "foo"}},
        DRY,
        unchanged,
    ),
    (
        "flex attention on a CPU",
        ("flex_attention has no backward pass on a CPU",),
        {"model": {"attn_implementation": "flex_attention"}},
        DRY,
        unchanged,
    ),
    (
        "a module that there is not, among others",
        ("model.lora.target_modules: v_projj is no part of", "linear layers are down_proj, gate_proj,"),
        {"model": {"lora": {"target_modules": ["q_proj", "v_projj"]}}},
        DRY,
        unchanged,
    ),
    (
        "trained whole: nothing",
        ("model.lora.modules_to_save: head is no part of",),
        {"model": {"lora": {"modules_to_save": ["head"]}}},
        DRY,
        unchanged,
    ),
    (
        "rank of nothing",
        ("model.lora.rank_pattern: layers.7.q_proj is no",),
        {"model": {"lora": {"rank_pattern": {"layers.7.q_proj": 4}}}},
        DRY,
        unchanged,
    ),
    (
        "rank of a module",
        ("model.lora.rank_pattern.q_proj: 100000 is more",),
        {"model": {"lora": {"rank_pattern": {"q_proj": 100000}}}},
        DRY,
        unchanged,
    ),
    (
        "layer that there is not",
        ("has layers 0 to 1, no 2",),
        {"model": {"lora": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}}},
        DRY,
        unchanged,
    ),
    (
        "revision of a folder",
        ("model.revision v2: ", "is a folder, without revisions"),
        {"model": {"revision": "v2"}},
        DRY,
        unchanged,
    ),
    ("rank of an adapter", ("model.lora.r: 100000 is more",), {"model": {"lora": {"r": 100000}}}, DRY, unchanged),
]
