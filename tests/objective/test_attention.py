"""Packed equals padded, log-probs and gradients, whatever a family's attention has beside plain causality."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsdpo.data.batch import Packed, PreferenceBatch, collate_padded
from dsdpo.data.collate import merge
from dsdpo.data.packed_layout import collate_packed
from dsdpo.data.pairs import Group
from dsdpo.errors import ConfigError
from dsdpo.objective import attention as module
from dsdpo.objective.attention import Variant, attend_at_once, attend_by_pair
from dsdpo.objective.logps import ResponseScorer, pair_logps, response_logps
from dsdpo.objective.packed_support import packed_refusal
from tests.tiny import random_pairs, tiny_lm

WINDOW = {"sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "mistral-window": ("mistral", WINDOW),
    "gemma2-window-softcap": ("gemma2", {**WINDOW, "attn_logit_softcapping": 2.0}),
    "gemma3-window": ("gemma3_text", WINDOW),
    "gpt_oss-window-sinks": ("gpt_oss", WINDOW),
    "deepseek_v3": ("deepseek_v3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gpt2": ("gpt2", {}),
}
# What attention goes by: tokens of a short pair, and queries of one block.
SIZES = {"together": (64, 1024), "by_pair": (0, 1024), "mixed": (24, 7)}


def pairs_of_all_kinds() -> list[Group]:
    """Random ones, and ones whose responses begin alike, are the same, or begin as the whole other."""
    first, second, third, fourth, fifth = random_pairs(5, seed=3, longest=30)
    return [
        first,
        replace(second, responses=tuple(np.r_[7, 8, response] for response in second.responses)),
        replace(third, responses=(third.responses[0], third.responses[0])),
        replace(fourth, responses=(fourth.responses[0], np.concatenate(fourth.responses))),
        fifth,
    ]


def scored(lm: Any, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Log-probs of all responses, and all gradients of a loss that weighs each response otherwise."""
    both = response_logps(ResponseScorer(lm), batch)[0].flatten()
    (both * torch.linspace(-1, 1, len(both))).sum().backward()
    return both.detach(), torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])


def assert_equal(packed: tuple[Tensor, Tensor], padded: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-4)
    assert (packed[1] - padded[1]).norm() < 1e-5 * padded[1].norm()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_padded(name: str, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", SIZES[sizes][0])
    monkeypatch.setattr(module, "ROWS_ON_CPU", SIZES[sizes][1])
    family, changes = FAMILIES[name]
    pairs = pairs_of_all_kinds()
    plain = tiny_lm(family, **changes)
    plain.set_attn_implementation("eager")
    assert packed_refusal(plain.config) is None
    padded = scored(plain, collate_padded(pairs, pad_token_id=0))
    lm = tiny_lm(family, **changes)
    lm.set_attn_implementation("dsdpo")
    assert_equal(scored(lm, collate_packed(pairs)), padded)
    if "sliding_window" in changes and sizes == "together":
        wider = scored(tiny_lm(family, **{**changes, "sliding_window": 100}), collate_padded(pairs, pad_token_id=0))
        assert (wider[0] - padded[0]).abs().max() > 0.1, "no sequence is longer than the window"


def groups_of(size: int, *, masked: bool = False) -> list[Group]:
    """Groups of up to `size` responses of all kinds, the last with one response only; some tokens not learned."""
    rng = np.random.default_rng(size)
    groups = []
    for index in range(5):
        prompt, *responses = (rng.integers(3, 97, size=rng.integers(2, 25)) for _ in range(size + 1))
        if index == 1:  # all begin alike, one is the whole beginning of another
            responses = [np.r_[7, 8, response] for response in responses]
            responses[-1] = np.r_[responses[0], 9, 10]
        if index == 2:
            responses = [responses[0]] * size
        if index == 4:
            responses[1:] = [np.zeros(0, dtype=np.int64)] * (size - 1)
        learned = tuple(
            np.arange(len(response)) % 3 != index % 3 if masked and len(response) > 2 else None
            for response in responses
        )
        groups.append(Group(index, prompt, tuple(responses), learned))
    return groups


@pytest.mark.parametrize(("size", "masked"), [(1, False), (2, True), (4, False), (4, True)])
def test_groups_of_any_size_score_like_their_sequences_one_by_one(size: int, masked: bool) -> None:
    """Both layouts against one sequence at a time with whole logits; tokens that are not learned count nowhere."""
    groups = groups_of(size, masked=masked)
    plain = tiny_lm()
    truth, counts = torch.zeros(size, len(groups)), torch.zeros(size, len(groups), dtype=torch.int64)
    for column, group in enumerate(groups):
        for row, response in enumerate(group.responses):
            if len(response):
                ids = torch.tensor(np.r_[group.prompt, response]).long()[None]
                logps = plain(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].float().log_softmax(-1)
                learned = group.learned_of(row)
                mask = torch.ones(len(response)) if learned is None else torch.tensor(learned).float()
                truth[row, column] = (logps.gather(-1, torch.tensor(response)[:, None])[:, 0] * mask).sum()
                counts[row, column] = int(mask.sum())
    parts = groups[:2], groups[2:]
    lms = {name: tiny_lm() for name in ("packed", "padded")}
    lms["packed"].set_attn_implementation("dsdpo")
    results = {}
    for layout, lm in lms.items():
        collate = collate_packed if layout == "packed" else partial(collate_padded, pad_token_id=0)
        scorer = ResponseScorer(lm)
        logps, tokens = response_logps(scorer, collate(groups))
        torch.testing.assert_close(logps, truth, rtol=1e-5, atol=1e-4)
        assert torch.equal(tokens, counts)
        merged = response_logps(scorer, merge([collate(part) for part in parts]))[0]
        torch.testing.assert_close(merged, truth, rtol=1e-5, atol=1e-4)
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        results[layout] = logps.detach(), torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])
    assert_equal(results["packed"], results["padded"])


def test_padded_batches_through_the_same_attention() -> None:
    """As the reference or an evaluation may be padded: the registered attention is then the ordinary one."""
    pairs = pairs_of_all_kinds()
    for name in ("llama", "mistral-window", "gemma2-window-softcap", "gpt_oss-window-sinks"):
        family, changes = FAMILIES[name]
        results = []
        for implementation in ("eager", "dsdpo"):
            lm = tiny_lm(family, **changes)
            lm.set_attn_implementation(implementation)
            results.append(scored(lm, collate_padded(pairs, pad_token_id=0)))
        assert_equal(results[1], results[0])


def test_bfloat16_differs_by_rounding() -> None:
    pairs = pairs_of_all_kinds()
    results = []
    for layout in ("padded", "packed"):
        lm = tiny_lm(scale=1.0).to(torch.bfloat16)
        lm.set_attn_implementation("dsdpo")
        batch = collate_packed(pairs) if layout == "packed" else collate_padded(pairs, pad_token_id=0)
        results.append(scored(lm, batch)[0])
    torch.testing.assert_close(results[0], results[1], rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing: bool) -> None:
    from peft import LoraConfig, get_peft_model

    pairs = pairs_of_all_kinds()
    results = []
    for layout in ("padded", "packed"):
        lm = tiny_lm("qwen3")
        lm.set_attn_implementation("dsdpo")
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
            lm.train()
        torch.manual_seed(0)
        adapted = get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        batch = collate_packed(pairs) if layout == "packed" else collate_padded(pairs, pad_token_id=0)
        results.append(scored(adapted, batch))
    assert len(results[0][1]) < sum(p.numel() for p in lm.parameters()), "all weights were trained"
    assert_equal(results[1], results[0])


def test_a_model_without_the_attention_is_never_silently_wrong() -> None:
    with pytest.raises(AssertionError, match="sdpa would let all pairs"):
        pair_logps(ResponseScorer(tiny_lm()), collate_packed(random_pairs(2)))
    lm = tiny_lm()
    lm.set_attn_implementation("dsdpo")
    with pytest.raises(ConfigError, match="LlamaAttention was not told of the packed row"):
        lm(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_generation_equals_eager_attention() -> None:
    prompt = torch.tensor([[0, 5, 9], [4, 6, 8]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for name in ("llama", "mistral-window", "gemma2-window-softcap"):
        family, changes = FAMILIES[name]
        answers = []
        for implementation in ("eager", "dsdpo"):
            lm = tiny_lm(family, **changes)
            lm.set_attn_implementation(implementation)
            answers.append(lm.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False))
        assert torch.equal(answers[0], answers[1])


VARIANTS = {
    "plain": Variant(None, 0.0, None, None, None),
    "scale": Variant(0.3, 0.0, None, None, None),
    "window": Variant(None, 0.0, 6, None, None),
    "softcap": Variant(None, 0.0, None, 1.5, None),
}


def flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """What flash_attn_varlen_func documents: masks are aligned with the last query and key of each sequence."""
    results = []
    for index in range(len(cu_seqlens_q) - 1):
        q = query[cu_seqlens_q[index] : cu_seqlens_q[index + 1]].transpose(0, 1)
        at = slice(cu_seqlens_k[index], cu_seqlens_k[index + 1])
        k, v = (part[at].transpose(0, 1).repeat_interleave(len(q) // part.shape[1], 0) for part in (key, value))
        assert q.shape[1] <= max_seqlen_q
        assert k.shape[1] <= max_seqlen_k
        scores = q @ k.transpose(1, 2) * (softmax_scale or q.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
        left, right = window_size[0], 0 if causal else window_size[1]
        hidden = (ahead > right) if right >= 0 else torch.zeros_like(ahead, dtype=torch.bool)
        hidden = hidden | (ahead < -left) if left >= 0 else hidden
        results.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)


def torch_varlen(*tensors: Any, scale: float | None, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn in the same terms: a right window of 0 is causal."""
    assert enable_gqa == (tensors[0].shape[1] != tensors[1].shape[1])
    assert window_size[1] == 0
    return flash_varlen(*tensors, softmax_scale=scale, causal=False, window_size=window_size, softcap=0.0)


def torch_varlen_without_groups(*tensors: Any, scale: float | None, window_size: tuple[int, int]) -> Tensor:
    """The same in a torch that wants a key head for each query head."""
    assert tensors[0].shape[1] == tensors[1].shape[1] == tensors[2].shape[1]
    return torch_varlen(*tensors, scale=scale, window_size=window_size, enable_gqa=False)


def flash4_varlen(*tensors: Any, window_size: tuple[int | None, int | None], **options: Any) -> tuple[Tensor, None]:
    """flash-attn 4 in the same terms: None for no bound, and the normalizers with the result."""
    assert -1 not in window_size
    left, right = (-1 if bound is None else bound for bound in window_size)
    return flash_varlen(*tensors, window_size=(left, right), **options), None


FLASH, TORCH = partial(module._flash_varlen, flash_varlen), partial(module._torch_varlen, torch_varlen)
TORCH_WITHOUT_GROUPS = partial(module._torch_varlen, torch_varlen_without_groups)
FLASH_4 = partial(module._flash_varlen, flash4_varlen, unbounded=None)


@pytest.mark.parametrize(
    ("kernel", "variant"),
    # torch's kernel has no soft-capping and is not taken for it.
    [
        *((FLASH, name) for name in VARIANTS),
        *((TORCH, name) for name in VARIANTS if name != "softcap"),
        (TORCH_WITHOUT_GROUPS, "window"),
        *((FLASH_4, name) for name in ("plain", "window")),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_one_call_for_all_groups(
    kernel: Callable[..., Tensor], variant: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA way on the CPU, with what flash attention documents in its place: outputs and gradients."""
    monkeypatch.setattr(module, "SHORT", 20)
    pairs = [*pairs_of_all_kinds(), *random_pairs(6, seed=9, longest=40)]
    batch = collate_packed(pairs if size == 2 else groups_of(size))
    layout = batch.attention
    assert isinstance(layout, Packed)
    torch.manual_seed(0)
    heads, size, value_size = (4, 2, 2), 8, 6  # of query, key and value
    tensors = [
        torch.randn(1, head, batch.num_tokens, width, requires_grad=True)
        for head, width in zip(heads, (size, size, value_size), strict=True)
    ]
    at_once = attend_at_once(*tensors, layout, VARIANTS[variant], kernel)
    by_pair = attend_by_pair(*tensors, layout, VARIANTS[variant])
    assert at_once.shape == (1, batch.num_tokens, 4, value_size)
    torch.testing.assert_close(at_once, by_pair)
    weights = torch.randn_like(by_pair)
    for ours, theirs in zip(
        *(torch.autograd.grad((o * weights).sum(), tensors) for o in (at_once, by_pair)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_flash_attn_4_is_taken_where_it_is_asked_for(tmp_path, monkeypatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("flash_attn_varlen_func = print")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "_capability", lambda device: (9, 0))
    query: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 8, 10, 128), device="cuda:0")
    for cached in (module._flash4_function, module._varlen_functions):
        cached.cache_clear()
    try:
        kernel: Any = module.varlen_kernel(query, VARIANTS["plain"], flash4=True)
        assert kernel.args == (print,)
        assert module.varlen_kernel(query, VARIANTS["plain"]).args != (print,)
    finally:
        for cached in (module._flash4_function, module._varlen_functions):
            cached.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]


def test_torch_has_the_function_that_is_called() -> None:
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": 1.0, "window_size": (-1, 0)}
    options |= {"enable_gqa": True} if module._knows_groups(varlen_attn) else {}
    inspect.signature(varlen_attn).bind(*range(7), **options)
    assert module._varlen_functions()[1] is varlen_attn


@pytest.mark.parametrize(
    ("dtype", "head_size", "variant", "capability", "reason"),
    [
        (torch.bfloat16, 64, {}, (8, 0), None),
        (torch.float16, 256, {"softcap": 30.0}, (9, 0), None),
        (torch.bfloat16, 64, {}, None, None),  # ROCm
        (torch.float16, 64, {}, (7, 5), "compute capability 7.5"),
        (torch.float32, 64, {}, (8, 0), "not float32"),
        (torch.bfloat16, 100, {}, (8, 0), "not 100"),
        (torch.bfloat16, 512, {}, (8, 0), "not 512"),
        (torch.bfloat16, 64, {"sinks": torch.zeros(2)}, (8, 0), "sinks"),
        (torch.bfloat16, 64, {"dropout": 0.1}, (8, 0), "dropout"),
    ],
)
def test_reasons_why_a_flash_kernel_cannot_be_used(dtype, head_size, variant, capability, reason) -> None:
    nothing = {"scale": None, "dropout": 0.0, "window": None, "softcap": None, "sinks": None}
    said = module.no_kernel_for(dtype, head_size, module.Variant(**nothing | variant), capability)
    assert (said is None) if reason is None else reason in said


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"flash_attn/cute/__init__.py": ""}, False),  # flash-attn 4: a namespace without the function
        ({"flash_attn/__init__.py": "raise OSError('undefined symbol')"}, False),
        ({"flash_attn/__init__.py": "flash_attn_varlen_func = print"}, True),
        ({"flash_attn/cute/__init__.py": "", "flash_attn_interface.py": "flash_attn_varlen_func = print"}, True),
        ({"flash_attn/__init__.py": "flash_attn_varlen_func = print", "flash_attn_interface.py": ""}, True),
    ],
)
def test_flash_attn_of_any_version_is_used_or_passed_over(files, found, tmp_path, monkeypatch) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        monkeypatch.delitem(sys.modules, name)
    module._varlen_functions.cache_clear()
    try:
        assert (module._varlen_functions()[0] is print) == found
    finally:
        module._varlen_functions.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
            del sys.modules[name]
