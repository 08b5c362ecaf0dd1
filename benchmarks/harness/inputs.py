"""Models and data made on the spot, so that a benchmark needs nothing but the repository."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.common import gpu_names

SPECIAL = ["<pad>", "<eos>", "<unk>"]


@dataclass(frozen=True)
class Size:
    """A Llama's size."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 4096
    context: int = 4096
    intermediate: int | None = None  # None: 8/3 of hidden
    tied: bool = True
    dtype: str = "float32"


SMALL = Size()  # 2.4 M parameters
MIDDLE = Size(hidden=384, heads=6, vocabulary=8192)  # 10 M parameters
DEMO = Size(hidden=32, layers=2, vocabulary=64)
# Of Llama 3.2 1B and Llama 3.1 8B, with a shorter context.
LLAMA_1B = Size(2048, 16, 32, 8, 128_256, 8192, intermediate=8192, dtype="bfloat16")
LLAMA_8B = Size(4096, 32, 32, 8, 128_256, 8192, intermediate=14_336, tied=False, dtype="bfloat16")


def make_model(folder: Path, size: Size, *, seed: int = 0) -> Path:
    """A Llama with random weights, and a tokenizer by which each word w0, w1, ... is one token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = [*SPECIAL, *(f"w{index}" for index in range(size.vocabulary - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = llama_config(size)
    # On a GPU where there is one: a CPU takes minutes to draw the weights of 8B.
    with torch.device("cuda" if gpu_names() else "cpu"):
        lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size.dtype))
    lm.save_pretrained(folder)
    if gpu_names():
        del lm
        torch.cuda.empty_cache()  # for the processes that load it
    return folder


def llama_config(size: Size, *, layers: int | None = None) -> Any:
    """A Llama's configuration of this size, or with another number of layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate or 8 * size.hidden // 3 // 16 * 16,
        num_hidden_layers=layers or size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=size.tied,
        dtype=size.dtype,
    )


def same_lengths(count: int, prompt: int, response: int) -> np.ndarray:
    """(count, 3) lengths of prompt, chosen and rejected, all alike."""
    return np.tile(np.array([prompt, response, response]), (count, 1))


def mixed_lengths(
    count: int, *, prompt: int = 384, response: int = 160, sigma: float = 0.5, longest: int = 2048, seed: int = 0
) -> np.ndarray:
    """(count, 3) lognormal lengths with these medians; prompt and response together at most `longest`."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(np.log([prompt, response, response]), sigma, size=(count, 3)))
    lengths = np.maximum(2, drawn.round()).astype(np.int64)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], longest // 2)
    lengths[:, 0] = np.minimum(lengths[:, 0], longest - lengths[:, 1:].max(1))
    return lengths


def random_rows(lengths: np.ndarray, vocabulary: int, *, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows of random words that have these lengths in tokens, the end of text that follows a response included."""
    rng = np.random.default_rng(seed)
    for prompt, *responses in lengths.tolist():
        texts = [_words(rng, prompt, vocabulary)]
        texts += [" " + _words(rng, max(1, response - 1), vocabulary) for response in responses]
        yield dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))


def _words(rng: np.random.Generator, count: int, vocabulary: int) -> str:
    return " ".join(f"w{index}" for index in rng.integers(0, vocabulary - len(SPECIAL), size=count).tolist())


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def first_rows(source: Path, path: Path, count: int) -> Path:
    """The first `count` rows of a JSONL file, nothing but prompt, chosen and rejected."""
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, count)]
    names = ("prompt", "chosen", "rejected")
    return write_rows(path, ({name: row[name] for name in names if name in row} for row in rows))


def make_adapter(model: Path, folder: Path, *, rank: int = 8, seed: int = 0) -> Path:
    """A fresh LoRA adapter on every linear layer but the head, for two sides to start from. Reads no weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(lm, settings)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for half in (module.lora_A, module.lora_B):
                half.to_empty(device="cpu")
            module.reset_lora_parameters("default", init_lora_weights=True)
    adapted.save_pretrained(folder)
    return folder


def model_and_rows(
    folder: Path, *, model: Path | None, data: Path | None, rows: int, size: Size = SMALL, lengths: Sequence[int] = ()
) -> tuple[Path, Path]:
    """The given model and the first rows of the given data, or others made in `folder`.

    `lengths` are the medians of prompt and response of made rows, in tokens. A given model needs given data, as the
    words of made rows are of the made tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (model is None) != (data is None):
        raise SystemExit("give --model and --data together, or neither")
    if model is not None and data is not None:
        return model.resolve(), first_rows(data, folder / "train.jsonl", rows)
    prompt, response = lengths or (96, 64)
    drawn = mixed_lengths(rows, prompt=prompt, response=response, longest=size.context)
    made = write_rows(folder / "train.jsonl", random_rows(drawn, size.vocabulary))
    return make_model(folder / "model", size), made
