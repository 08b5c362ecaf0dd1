"""What computes otherwise on a GPU than on a CPU, piece by piece: attention, output head, optimizer, copies, clocks."""

from __future__ import annotations

import importlib
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dsdpo.data.batch import Packed, collate_padded
from dsdpo.data.packed_layout import collate_packed
from dsdpo.data.prefetch import pinned, prefetch
from dsdpo.engine.kernels import use_liger
from dsdpo.objective import attention as module
from dsdpo.objective.attention import Kernel, Variant, attend_at_once, attend_by_pair, no_kernel_for
from dsdpo.objective.chunked_head import ChunkedHead
from dsdpo.objective.logps import ResponseScorer, response_logps
from dsdpo.objective.output_head import LogitTransform
from dsdpo.objective.sequence_parallel import own_tokens, whole_row
from dsdpo.sequence_group import SequenceGroup
from dsdpo.training.perf import DeviceLaps
from tests.gpu.support import DEVICE, ON_CUDA, RANKS, distance
from tests.ranks import run_ranks
from tests.tiny import random_pairs, tiny_lm

BF16 = 2**-8  # relative rounding of one number
PACKAGES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
VARIANTS = {
    "plain": Variant(None, 0.0, None, None, None),
    "scale": Variant(0.05, 0.0, None, None, None),
    "window": Variant(None, 0.0, 48, None, None),
    "softcap": Variant(None, 0.0, None, 20.0, None),
}


def kernel_of(name: str) -> Kernel:
    """An installed kernel; skips the test without."""
    if name == "torch":
        function = module._varlen_functions()[1]
        if function is None:
            pytest.skip("this torch has no varlen_attn with windows")
        return partial(module._torch_varlen, function)
    try:
        function = getattr(importlib.import_module(PACKAGES[name]), "flash_attn_varlen_func", None)
    except ImportError:
        function = None
    if function is None:
        pytest.skip(f"{name} is not installed")
    unbounded = None if name == "flash-attn 4" else -1
    return partial(module._flash_varlen, function, unbounded=unbounded)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*PACKAGES, "torch"])
def test_varlen_kernel_equals_pair_by_pair(name: str, variant: str, size: int, record_property: Any) -> None:
    """Outputs and gradients in bfloat16 with grouped keys, against the same numbers pair by pair in float32."""
    if name == "torch" and variant == "softcap":
        pytest.skip("torch's kernel has no soft-capping and is not taken for it")
    kernel, chosen = kernel_of(name), VARIANTS[variant]
    assert no_kernel_for(torch.bfloat16, size, chosen, torch.cuda.get_device_capability()) is None
    batch = collate_packed(random_pairs(24, seed=3, longest=220)).to(DEVICE)
    layout = batch.attention
    assert isinstance(layout, Packed)
    torch.manual_seed(0)
    low = [torch.randn(1, heads, batch.num_tokens, size, device=DEVICE).bfloat16() for heads in (8, 2, 2)]
    weights = torch.randn(1, batch.num_tokens, 8, size, device=DEVICE)

    def answers(tensors: list[Tensor], attend: Any) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attend(*leaves, layout, chosen)
        return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), leaves)]

    truth = answers([tensor.float() for tensor in low], attend_by_pair)
    try:
        found = answers(low, partial(attend_at_once, kernel=kernel))
    except (NotImplementedError, AssertionError) as error:
        if name != "flash-attn 4":  # not finished, and taken only where a run asks for it
            raise
        pytest.skip(f"flash-attn 4 does not compute it: {error}")
    worst = max(distance(ours, exact) for ours, exact in zip(found, truth, strict=True))
    record_property("relative error", f"{worst:.1e}")
    assert worst < 4 * BF16


@pytest.mark.gpu
def test_attention_sinks_pair_by_pair(record_property: Any) -> None:
    """No kernel has sinks: bfloat16 against float32, both with all scores in memory."""
    batch = collate_packed(random_pairs(12, seed=3, longest=120)).to(DEVICE)
    layout = batch.attention
    assert isinstance(layout, Packed)
    torch.manual_seed(0)
    low = [torch.randn(1, heads, batch.num_tokens, 64, device=DEVICE).bfloat16() for heads in (8, 2, 2)]
    variant = Variant(None, 0.0, 32, None, torch.randn(8, device=DEVICE))
    truth = attend_by_pair(*(tensor.float() for tensor in low), layout, variant)
    error = distance(attend_by_pair(*low, layout, variant), truth)
    record_property("relative error", f"{error:.1e}")
    assert error < 4 * BF16


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "attn_logit_softcapping": 20.0},
    "gpt_oss": {"sliding_window": 24},
    "deepseek_v3": {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 32, "head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES if ON_CUDA else ["llama"])
def test_packed_equals_padded(family: str, record_property: Any) -> None:
    """In float32 to rounding; in bfloat16 no further from the float32 truth than the padded layout is."""
    pairs = random_pairs(8, seed=5, longest=60)
    changes = {"head_dim": 64, **FAMILIES[family]}

    def scored(layout: str, dtype: torch.dtype) -> list[Tensor]:
        lm = tiny_lm(family, scale=1.0, **changes).to(DEVICE, dtype)
        lm.set_attn_implementation("dsdpo" if layout == "packed" else "eager")
        batch = collate_packed(pairs) if layout == "packed" else collate_padded(pairs, pad_token_id=0)
        logps = response_logps(ResponseScorer(lm), batch.to(DEVICE))[0].flatten()
        (logps * torch.linspace(-1, 1, len(logps), device=DEVICE)).sum().backward()
        return [logps.detach(), torch.cat([p.grad.flatten().float() for p in lm.parameters() if p.grad is not None])]

    truth = scored("padded", torch.float32)
    exact = max(distance(*both) for both in zip(scored("packed", torch.float32), truth, strict=True))
    record_property("float32", f"{exact:.1e}")
    assert exact < 1e-4
    for packed, padded, true in zip(
        scored("packed", torch.bfloat16), scored("padded", torch.bfloat16), truth, strict=True
    ):
        record_property("bfloat16, packed / padded", f"{distance(packed, true):.1e} / {distance(padded, true):.1e}")
        assert distance(packed, true) < 2 * distance(padded, true) + BF16


@pytest.mark.parametrize(("tokens", "vocabulary"), [(4096, 128_256)] if ON_CUDA else [(64, 512)])
def test_chunked_head_in_bfloat16(tokens: int, vocabulary: int, record_property: Any) -> None:
    """Log-probs and gradients of the head in bfloat16 against whole logits of the same weights in float32."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 256, device=DEVICE).bfloat16()
    head = torch.nn.Linear(256, vocabulary, bias=False, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    weights = torch.randn(tokens, device=DEVICE)
    exact, exact_head = hidden.float().requires_grad_(), head.weight.detach().float().requires_grad_()
    truth = (exact @ exact_head.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (truth * weights).sum().backward()
    head.__class__, head.transform = ChunkedHead, LogitTransform()
    hidden.requires_grad_()
    found = head(hidden, targets)
    (found * weights).sum().backward()
    assert exact.grad is not None
    for name, ours, true in (
        ("log-probs", found, truth),
        ("gradient of hidden states", hidden.grad, exact.grad),
        ("gradient of weights", head.weight.grad, exact_head.grad),
    ):
        record_property(name, f"{distance(ours.detach(), true.detach()):.1e}")
        assert distance(ours.detach(), true.detach()) < 4 * BF16, name


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_time_and_memory_of_both_heads(trained: bool, record_property: Any) -> None:
    """Forward and backward of the chunked and the fused head at Llama 3 8B's size: figures to choose by."""
    fused_head = pytest.importorskip("dsdpo.objective.fused_head", reason="triton is not installed")
    hidden = torch.randn(8192, 4096, device=DEVICE).bfloat16().requires_grad_()
    head: Any = torch.nn.Linear(4096, 128_256, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(trained)
    head.__class__, head.transform = ChunkedHead, LogitTransform()
    targets = torch.randint(0, 128_256, (8192,), device=DEVICE)
    sums = {}
    for name, kernels in (("chunked", None), ("fused", fused_head)):
        head.kernels = kernels
        for _ in range(4):  # the last one counts
            hidden.grad = head.weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, started = torch.cuda.memory_allocated(), time.perf_counter()
            logps = head(hidden, targets)
            logps.sum().backward()
            torch.cuda.synchronize()
            milliseconds = 1000 * (time.perf_counter() - started)
        sums[name] = logps.detach()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        record_property(name, f"{milliseconds:.1f} ms, {peak:.2f} GiB")
    assert distance(sums["fused"], sums["chunked"]) < BF16


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_liger_equals_the_models_own_modules(family: str, layout: str, record_property: Any) -> None:
    """Log-probs and gradients in float32, of packed rows whose positions begin anew with each pair."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    pairs = random_pairs(8, seed=5, longest=60)
    batch = (collate_packed(pairs) if layout == "packed" else collate_padded(pairs, pad_token_id=0)).to(DEVICE)
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    before = dict(vars(code))

    def scored(with_liger: bool) -> list[Tensor]:
        lm = tiny_lm(family, scale=1.0, head_dim=64).to(DEVICE)
        lm.set_attn_implementation("dsdpo" if layout == "packed" else "eager")
        if with_liger:
            use_liger(lm)
        logps = response_logps(ResponseScorer(lm), batch)[0].flatten()
        (logps * torch.linspace(-1, 1, len(logps), device=DEVICE)).sum().backward()
        return [logps.detach(), torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])]

    truth = scored(False)
    try:
        found = scored(True)
    finally:
        vars(code).update(before)  # Liger takes the place of a module's classes and functions
    worst = max(distance(ours, exact) for ours, exact in zip(found, truth, strict=True))
    record_property("relative error", f"{worst:.1e}")
    assert 0 < worst < 1e-4


def split_row(dtype: torch.dtype) -> float:
    """Of attention over a row split over all ranks, the relative error of outputs and gradients of this rank's part."""
    group = SequenceGroup(size=dist.get_world_size(), place=dist.get_rank(), groups=1, handle=dist.group.WORLD)
    batch = collate_packed(random_pairs(12, seed=3, longest=120)).to(DEVICE)
    layout, variant = batch.attention, VARIANTS["window"]
    assert isinstance(layout, Packed)
    start, size = group.part(batch.num_tokens)
    mine = slice(start, min(start + size, batch.num_tokens))
    torch.manual_seed(0)
    whole = [torch.randn(1, heads, batch.num_tokens, 64, device=DEVICE, dtype=dtype) for heads in (8, 2, 2)]
    weights = torch.randn(1, batch.num_tokens, 8, 64, device=DEVICE)

    def answers(leaves: list[Tensor], out: Tensor, count: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad((out.float() * count).sum(), leaves)]

    leaves = [tensor.float().requires_grad_() for tensor in whole]
    truth = answers(leaves, attend_by_pair(leaves[0], leaves[1], leaves[2], layout, variant), weights)
    beyond = group.size * size - batch.num_tokens
    parts = [pad(tensor, (0, 0, 0, beyond))[:, :, start : start + size].clone().requires_grad_() for tensor in whole]
    q, k, v = whole_row(parts[0], parts[1], parts[2], batch.num_tokens, group)
    kernel = module.varlen_kernel(q, variant)
    attended = attend_at_once(q, k, v, layout, variant, kernel) if kernel else attend_by_pair(q, k, v, layout, variant)
    out = own_tokens(attended, group)
    found = answers(parts, out, pad(weights, (0, 0, 0, 0, 0, beyond))[:, start : start + size])
    count = mine.stop - mine.start
    errors = [distance(found[0][:, :count], truth[0][:, mine])]
    errors += [distance(f[:, :, :count], t[:, :, mine]) for f, t in zip(found[1:], truth[1:], strict=True)]
    return max(errors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_over_a_split_row(dtype: str, record_property: Any) -> None:
    """The exchange of heads and tokens between ranks, there and back; on one GPU the rank exchanges with itself."""
    worst = max(run_ranks(RANKS, split_row, getattr(torch, dtype)))
    record_property(f"relative error on {RANKS} ranks", f"{worst:.1e}")
    assert worst < (1e-5 if dtype == "float32" else 4 * BF16)


@pytest.mark.gpu
def test_fused_adam_equals_adam() -> None:
    """torch's fused AdamW on the device, which policies get, against its plain one on the host."""
    torch.manual_seed(0)
    start = torch.randn(1000, 64)
    gradients = [torch.randn_like(start) for _ in range(20)]
    results = []
    for device, fused in (("cuda", True), ("cpu", False)):
        weight = start.clone().to(device).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=fused)
        for gradient in gradients:
            weight.grad = gradient.to(device)
            optimizer.step()
        results.append(weight.detach().cpu())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def busy(seconds: float) -> None:
    """Queue work on the device that takes about so long."""
    # Large, so that few products take long: a host that has queued some thousand kernels waits until one is done.
    matrix = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        matrix @ matrix
    torch.cuda.synchronize()
    once = (time.perf_counter() - started) / 20
    for _ in range(int(seconds / once)):
        matrix @ matrix


@pytest.mark.gpu
def test_device_clock_equals_wall_clock(record_property: Any) -> None:
    """Seconds of phases by CUDA events against the host's clock around a wait."""
    busy(0.01)
    torch.cuda.synchronize()
    laps, started = DeviceLaps(), time.perf_counter()
    busy(0.2)
    laps.mark("policy")
    busy(0.1)
    laps.mark("reference")
    seconds = laps.take()
    wall = time.perf_counter() - started
    record_property("events / wall", f"{sum(seconds.values()) / wall:.3f}")
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.05)
    assert seconds["policy"] > seconds["reference"]


@pytest.mark.gpu
def test_copies_of_batches_do_not_wait(record_property: Any) -> None:
    """A batch made ahead lies in pinned memory, and its copy is queued behind running work without a wait."""
    batch = collate_padded(random_pairs(64, seed=1, longest=400), pad_token_id=0)
    assert pinned(batch).input_ids.is_pinned()
    windows = prefetch([(batch,), (batch,)], DEVICE)
    next(windows)
    torch.cuda.synchronize()
    busy(0.3)
    started = time.perf_counter()
    next(windows)
    copied = time.perf_counter() - started
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    record_property("host / device", f"{copied * 1000:.1f} / {whole * 1000:.0f} ms")
    assert copied < whole / 4


@pytest.mark.gpu
def test_kernels_are_taken_on_this_gpu() -> None:
    """A bfloat16 query of an ordinary head size is never left to the slow way on a GPU that has a kernel."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels need compute capability 8.0")
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 8, 10, 128), device=torch.device("cuda:0"))
    assert module.varlen_kernel(query, VARIANTS["plain"]) is not None
