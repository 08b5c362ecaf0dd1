"""The split of a step by kind of work: rules by name, a device's timeline by hand, and a real run on two ranks."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.kinds import (
    ATTENTION,
    COLLECTIVE,
    COPY,
    DEEPSPEED,
    ELEMENTWISE,
    GEMM,
    HEAD,
    HOST,
    NORM,
    NORM_RANGE,
    OPTIMIZER,
    UNKNOWN,
    WAIT,
    kind_of_kernel,
    kind_of_operator,
)
from benchmarks.harness.roofline import Peak, Shape, Work, shortest
from benchmarks.harness.trace import Split, read_trace, split_events
from benchmarks.measured.split_ranks import named_ranges, work_of
from dsdpo.objective.flops import ModelFlops, pair_work
from tests.ranks import run_ranks
from tests.runs import settings, train_here

# As CUPTI gives them: products from traces in vLLM's, SGLang's and llm.c's repositories (cuBLAS's on Ampere and Hopper,
# which changed names with CUDA 12.8), the rest from the sources of torch 2.13, flash-attention 2 and 3, NCCL 2.27,
# cuDNN and Liger, and torch's inductor.
KERNELS = {
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_"
    "cublas": GEMM,
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT": GEMM,
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn": GEMM,
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(...)": GEMM,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, true, false, false>(...)": GEMM,
    "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16>(...)": GEMM,
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, "
    "cutlass::bfloat16_t> >(pytorch_flash::Flash_fwd_params)": ATTENTION,
    "void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64> >(...)": ATTENTION,
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...> > >(...)": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)": ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_128x128x128_4x1x1_kernel0_0": ATTENTION,
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(...)": NORM,
    "_rms_norm_forward_kernel": NORM,
    "_triton_rope": NORM,
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3": NORM,
    "triton_poi_fused_mul_silu_5": ELEMENTWISE,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<...> >(...)": ELEMENTWISE,
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<...> >(...)": ELEMENTWISE,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<...> > >(...)": ELEMENTWISE,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<...>(...)": ELEMENTWISE,
    "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, ...>(...)": ELEMENTWISE,
    "_swiglu_forward_kernel": ELEMENTWISE,
    "Memcpy DtoD (Device -> Device)": ELEMENTWISE,
    "Memset (Device)": ELEMENTWISE,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<...> >()": OPTIMIZER,
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": COLLECTIVE,
    "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": COLLECTIVE,
    "Memcpy HtoD (Pinned -> Device)": COPY,
    "Memcpy DtoH (Device -> Pageable)": COPY,
    "_sums": HEAD,
    "a_kernel_that_nobody_has_seen": UNKNOWN,
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_by_name(name: str) -> None:
    assert kind_of_kernel(name) == KERNELS[name]


GEMM_NAME, ADD_NAME = "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "void at::native::vectorized_elementwise_kernel<4>()"


@pytest.mark.parametrize(
    ("around", "name", "kind"),
    [
        (("forward_backward", "_ChunkedLogp", "aten::mm"), GEMM_NAME, HEAD),
        (("autograd::engine::evaluate_function: _ChunkedLogpBackward", "aten::mm"), GEMM_NAME, HEAD),
        (("forward_backward", NORM_RANGE, "aten::mul"), ADD_NAME, NORM),
        (("optimizer", f"{DEEPSPEED}DeepSpeedZeroOptimizer_Stage3.step", "aten::mul_"), ADD_NAME, OPTIMIZER),
        (("optimizer", "c10d::_allgather_base_"), "ncclDevKernel_AllGather_RING_LL", COLLECTIVE),
        ((f"{DEEPSPEED}DeepSpeedZeroOptimizer_Stage3.__add_grad_to_ipg_bucket",), "Memcpy DtoD", COLLECTIVE),
        ((NORM_RANGE, f"{DEEPSPEED}PartitionedParameterCoordinator.fetch_sub_module"), "Memcpy DtoD", COLLECTIVE),
        (("reference", "aten::scaled_dot_product_attention"), ADD_NAME, ATTENTION),
        (("forward_backward", "aten::linear", "aten::mm"), GEMM_NAME, GEMM),
    ],
)
def test_what_a_kernel_serves_decides(around: tuple[str, ...], name: str, kind: str) -> None:
    assert kind_of_kernel(name, around) == kind


@pytest.mark.parametrize(
    ("stack", "kind"),
    [
        (("data",), WAIT),
        (("forward_backward",), HOST),
        (("forward_backward", "aten::transpose"), HOST),
        (("forward_backward", f"{DEEPSPEED}AllGatherCoalescedHandle.wait"), COLLECTIVE),
        (("optimizer", "Optimizer.step#DeepSpeedCPUAdam.step"), OPTIMIZER),
        (("optimizer",), HOST),
        (("forward_backward", "aten::an_operator_that_nobody_has_seen"), UNKNOWN),
    ],
)
def test_operators_own_time(stack: tuple[str, ...], kind: str) -> None:
    assert kind_of_operator(stack) == kind


def event(category: str, name: str, start: float, end: float, thread: Any = 1, **arguments: Any) -> dict[str, Any]:
    """One event of a Chrome trace, µs."""
    times = {"ts": start, "dur": end - start}
    return {"ph": "X", "cat": category, "name": name, "tid": thread, **times, "args": arguments}


def test_a_devices_timeline_by_hand() -> None:
    """Two steps of 100 µs: kernels, a gather half hidden, a copy, and gaps in which the host waits or works."""
    launches = [
        event("cpu_op", "aten::rsqrt", 11, 13, **{"Sequence number": 7}),
        event("user_annotation", NORM_RANGE, 10, 14),
        event("cuda_runtime", "cudaLaunchKernel", 12, 13, correlation=1),
        event("cpu_op", "autograd::engine::evaluate_function: RsqrtBackward0", 30, 34, 2,
              **{"Sequence number": 7, "Fwd thread id": 1}),
        event("cuda_runtime", "cudaLaunchKernel", 31, 32, 2, correlation=2),
        event("cpu_op", "aten::mul", 40, 41, 2, **{"Sequence number": 7}),  # computed anew by a checkpoint
        event("cuda_runtime", "cudaLaunchKernelExC", 16, 17, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 18, 19, correlation=5),
    ]  # fmt: skip
    device = [
        event("kernel", ADD_NAME, 12, 22, "stream 7", correlation=1),
        event("kernel", GEMM_NAME, 22, 42, "stream 7", correlation=3),
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 32, 52, "stream 20", correlation=4),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 50, 62, "stream 24", correlation=5, bytes=1000),
        event("kernel", ADD_NAME, 70, 75, "stream 7", correlation=2),
    ]
    phases = [
        event("user_annotation", "data", 0, 8),
        event("user_annotation", "forward_backward", 8, 80),
        event("user_annotation", "optimizer", 80, 85),
        event("user_annotation", "log", 85, 100),
        event("cuda_runtime", "cudaStreamSynchronize", 86, 99),
    ]
    first = [*phases, *launches, *device]
    again = [{**one, "ts": one["ts"] + 100} for one in phases]
    one, two = split_events([*first, *again])
    expected = {NORM: 10 + 5, GEMM: 20, COLLECTIVE: 10, COPY: 10, WAIT: 8 + 13}
    expected[HOST] = 100 - sum(expected.values())
    assert {kind: 1e6 * seconds for kind, seconds in one.kinds.items()} == pytest.approx(expected)
    assert one.hidden[COLLECTIVE] == pytest.approx(10e-6)
    assert one.hidden[COPY] == pytest.approx(2e-6)
    assert (one.copied, one.launches) == (1000, 5)
    assert two.kinds == pytest.approx({WAIT: 21e-6, HOST: 79e-6})
    assert two.wall == pytest.approx(100e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_crowded_timeline_against_each_microsecond(seed: int) -> None:
    """Sixty kernels, gathers and copies on three streams, beside a count of what runs in every single microsecond."""
    rng = random.Random(seed)
    names = {GEMM_NAME: GEMM, "ncclDevKernel_AllGather_RING_LL": COLLECTIVE, "Memcpy HtoD (Pinned -> Device)": COPY}
    ran = []
    for _ in range(60):
        start, name = rng.randint(0, 380), rng.choice(list(names))
        ran.append((start, start + rng.randint(1, 25), name))
    phases = [("data", 0, 30), ("forward_backward", 30, 380), ("optimizer", 380, 390), ("log", 390, 400)]
    (step,) = split_events(
        [event("user_annotation", name, start, end) for name, start, end in phases]
        + [event("kernel", name, start, end, f"stream {rng.randint(0, 2)}") for start, end, name in ran]
    )
    counted: Counter[str] = Counter()
    for moment in range(400):
        running = {names[name] for start, end, name in ran if start <= moment < end}
        first = next((kind for kind in (GEMM, COLLECTIVE, COPY) if kind in running), None)
        counted[first or (WAIT if moment < 30 else HOST)] += 1
    assert {kind: 1e6 * seconds for kind, seconds in step.kinds.items() if seconds} == pytest.approx(counted)
    for kind in names.values():
        whole = sum(min(end, 400) - start for start, end, name in ran if names[name] == kind)
        assert 1e6 * step.hidden[kind] == pytest.approx(whole - counted[kind])


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no phases of training steps"):
        split_events([event("cpu_op", "aten::mm", 0, 1)])


def traced_run(run: dict[str, Any]) -> None:
    """Train on this rank with named ranges."""
    with named_ranges():
        train_here(run)


def test_a_real_run_adds_up(inputs: Path, tmp_path: Path) -> None:
    """Two ranks under ZeRO-3 with checkpointing: each kind that a CPU has takes time, nothing is unclassified."""
    run = settings(
        tmp_path, inputs,
        tracking={"profile_steps": [2, 3]}, model={"gradient_checkpointing": True}, train={"max_steps": 3},
    )  # fmt: skip
    run_ranks(2, traced_run, run)
    for rank in (0, 1):
        steps = read_trace(Path(run["output_dir"]) / "profile" / f"rank-{rank}.trace.json.gz")
        assert len(steps) == 2
        for step in steps:
            adds_up(step)


def adds_up(step: Split) -> None:
    """The kinds are the whole, and none that a CPU has is missing."""
    assert sum(step.kinds.values()) == pytest.approx(step.wall, rel=1e-3)
    assert all(seconds >= 0 for seconds in step.kinds.values())
    for kind in (GEMM, ATTENTION, HEAD, NORM, ELEMENTWISE, OPTIMIZER, COLLECTIVE, WAIT, HOST):
        assert step.kinds[kind] > 0, kind
    assert COPY not in step.kinds, "a CPU has no device"
    assert step.kinds.get(UNKNOWN, 0.0) < 0.001 * step.wall, step.unknown
    assert step.launches > 100
    assert 0 < sum(step.host.values()) <= step.kinds[HOST]
    assert step.host["DeepSpeed's hooks"] > step.host["autograd"] > 0


def test_work_by_kind_is_the_formulas() -> None:
    """A trunk of 10 elements and a head of 4, all trained, beside a frozen copy: 3 + 1 passes of 2 operations each."""
    import numpy as np

    lengths = np.array([[3, 3, 2]])
    model = ModelFlops(trunk=10, trunk_trained=10, head=4, head_trained=4, attention={None: 2})
    found = work_of(lengths, model, model)
    work = pair_work(lengths)
    assert (found["tokens"], found["scored"]) == (6, 5)
    assert found["trunk"] == 4 * 2 * 10 * 6
    assert found["head"] == 4 * 2 * 4 * 5
    assert found["attention"] == (3 + 1) * 4 * 2 * work.attended[None]
    assert sum(found[name] for name in ("trunk", "head", "attention")) == pytest.approx(
        2 * model.forward(work) + model.backward(work)
    )


def test_shortest_times_by_hand() -> None:
    """A layer of 4 with an MLP of 8 in 16 bits: its norms and rotary embedding move 2·(12 + 8) elements forward."""
    shape = Shape.of(
        {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1,
         "intermediate_size": 8}, itemsize=2,
    )  # fmt: skip
    assert shape.norms_bytes(backward=False) == 2 * 2 * (12 + 8)
    assert shape.norms_bytes(backward=True) == 2 * (2 * (12 + 8) + 3 * 12 + 2 * 8)
    assert shape.elementwise_bytes(backward=False) == 2 * (3 * 8 + 3 * 8 + 2 * 4)
    peak = Peak(tflops=1.0, copy_gb_s=1.0, link_gb_s=2.0, launch_us=5.0)
    work = Work(trunk=1e12, attention=2e12, head=3e12, tokens=1e9, trained=1e9, exchanged=1e9, copied=4e9)
    found = shortest(work, shape, peak)
    assert (found[GEMM], found[ATTENTION], found[HEAD], found[COPY]) == (1.0, 2.0, 3.0, 2.0)
    assert found[NORM] == pytest.approx(80 + 184)
    assert found[OPTIMIZER] == pytest.approx(28.0)
    assert found[COLLECTIVE] == pytest.approx(2.0)
