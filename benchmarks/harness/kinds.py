"""The kind of work that an operator, kernel or copy in a trace of torch's profiler is, by its name and what it serves.

A name is enough for most. Where it is not (a product of the output head is a product like others, a norm is a few
multiplications), what encloses the operator decides, or the kernel's launch: an autograd function, a phase of the step,
a named range. A backward operator is enclosed by what enclosed the forward operator that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

GEMM, ATTENTION, NORM, HEAD = "matrix products", "attention", "norms and rotary", "output head"
ELEMENTWISE, OPTIMIZER = "element-wise and other", "optimizer"
COLLECTIVE, COPY = "gathers and reductions", "copies from and to the host"
WAIT, HOST, UNKNOWN = "waits", "host", "unclassified"
KINDS = (GEMM, ATTENTION, HEAD, NORM, ELEMENTWISE, OPTIMIZER, COLLECTIVE, COPY, WAIT, HOST, UNKNOWN)
MODEL = (GEMM, ATTENTION, HEAD, NORM, ELEMENTWISE)  # what the two models compute
OF_HOST_ALONE = (WAIT, HOST)  # while which a device stands still

NORM_RANGE = "norms and rotary"  # named ranges that benchmarks.measured.split_ranks adds
DEEPSPEED = "deepspeed/"
DATA, OPTIMIZER_PHASE, TORCH_OPTIMIZER = "data", "optimizer", "Optimizer.step#"

_COLLECTIVE = re.compile(rf"^c10d::|^gloo:|nccl|record_param_comms|^{DEEPSPEED}.*\.wait$", re.I)
# DeepSpeed's functions that gather, give back, partition or reduce, with copies from and into buffers.
_GATHERING = re.compile(
    rf"^{DEEPSPEED}.*(fetch_sub_module|release|_partition_param|partition_grads|partition_all_parameters|gather|reduce|"
    r"_ipg_|partition_epilogue|free_param|process_gradients|_forward_hook|_module_hook|_before_backward|_after_backward)",
    re.I,
)
_HEAD = re.compile(r"\b_ChunkedLogp")
_HEAD_KERNEL = re.compile(r"^(_sums|_gradient)$")  # of dsdpo/objective/fused_head.py
_ATTENTION = re.compile(
    r"scaled_dot_product|ScaledDotProduct|flash|fmha|efficient_attention|varlen_attn|VarlenAttn|mem_eff|"
    r"cudnn_\w*sdpa|sdpa",
    re.I,
)
_GEMM_OP = re.compile(r"^aten::(add|b|badd|_scaled_|_int_)?(mm|mv|dot)\w*$")
_GEMM_KERNEL = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|s16816|_scaled_mm|^dot_kernel|triton_tem", re.I)
_NORM = re.compile(r"layer_?norm|rms_?norm|rotary|rope\b|_rope|rsqrt", re.I)
_OPTIMIZER_KERNEL = re.compile(r"multi_tensor_apply|adam|FusedOptimizer", re.I)
_ELEMENTWISE_KERNEL = re.compile(
    r"elementwise|reduce|CatArray|index|gather|scatter|soft_?max|fill|memset|memcpy dtod|copy|triton_(poi|red|per)|"
    r"\bcub\b|thrust|at_cuda_detail|embedding|bitonic|radix|sort|arange|distribution|where|nonzero|at::native|"
    r"cross_entropy|swiglu|geglu|silu",
    re.I,
)
# Around each module under ZeRO-3. What encloses whole passes has the models' own Python in it.
_HOOK = re.compile(rf"{DEEPSPEED}(?!DeepSpeedEngine\.(forward|backward)$)|(autograd::\S+ )?(Pre|Post)Backward")
_OPERATOR = re.compile(r"^(?!autograd::|torch::)\w+::")
# Operators that make no number, which take the host's time alone: views, sizes, memory.
_VIEW = re.compile(
    r"^(aten::)?(as_strided|view|view_as|_unsafe_view|_reshape_alias|reshape|transpose|permute|t|numpy_T|expand|"
    r"expand_as|slice|select|narrow|squeeze|unsqueeze|split|split_with_sizes|chunk|unbind|flatten|unflatten|unfold|"
    r"detach|detach_|alias|set_|resize_|empty|empty_like|empty_strided|new_empty|new_empty_strided|lift_fresh|"
    r"result_type|is_nonzero|item|_local_scalar_dense|resolve_conj|resolve_neg|real|to|_to_copy|contiguous|"
    r"_has_compatible_shallow_copy_type|unflatten_dense_tensors|_nested_tensor_size|record_stream|pin_memory|"
    r"_pin_memory|is_pinned|data|requires_grad_|movedim|swapaxes|broadcast_to|unsafe_split|unsafe_chunk|size|stride|"
    r"scalar_tensor|_assert_async|diagonal|repeat|stack|zeros|ones|zeros_like|ones_like|full|full_like|new_zeros|"
    r"new_ones|new_full|clone|matmul|linear|logsumexp|scaled_dot_product_attention|hstack|vstack|flatten_dense_tensors|"
    r"slice_backward|select_backward|index_select_backward|embedding_backward)$"
)
_ELEMENTWISE_OP = re.compile(
    r"^aten::_?_?(add|sub|rsub|mul|div|neg|pow|square|rsqrt|sqrt|exp|exp2|expm1|log|log1p|log2|sin|cos|tanh|sigmoid|"
    r"silu|gelu|relu|softplus|log_sigmoid|log_softmax|softmax|abs|sign|reciprocal|clamp|clamp_min|clamp_max|minimum|"
    r"maximum|max|min|amax|amin|argmax|sum|mean|prod|cumsum|std|var|norm|linalg_vector_norm|foreach_\w+|addcmul|addcdiv|"
    r"lerp|where|masked_fill|fill|zero|copy|cat|index|index_put|index_put_impl|index_add|index_select|index_copy|"
    r"gather|scatter|scatter_add|embedding|embedding_dense|embedding_dense_backward|all|any|eq|ne|ge|gt|le|lt|isnan|"
    r"isinf|isfinite|logical_\w+|bitwise_\w+|and|or|xor|not|invert|arange|tril|triu|roll|flip|sort|topk|searchsorted|"
    r"bucketize|constant_pad_nd|pad|native_dropout|dropout|bernoulli|uniform|normal|random|randn?|floor|ceil|round|"
    r"remainder|fmod|nan_to_num|polar|complex|repeat_interleave|nonzero|unique\w*|bincount|one_hot|threshold|cross_entropy\w*|"
    r"nll_loss\w*|\w+_backward\w*|\w+_forward|fused_adamw?|amp_\w+|floor_divide|true_divide)_?_?$"
)


def kind_of_operator(stack: Sequence[str]) -> str:
    """The kind of an operator's own time on a CPU, given the names of what encloses it, outermost first, then its own.

    What is not spent in an operator that computes is the host's: Python, and operators that only make views.
    """
    name, around = stack[-1], stack[:-1]
    if _COLLECTIVE.search(name):
        return COLLECTIVE
    if not _OPERATOR.match(name) or _VIEW.match(name):
        return _of_host(stack)
    if (served := _served(around)) is not None:
        return served
    if _ATTENTION.search(name):
        return ATTENTION
    if _GEMM_OP.match(name):
        return GEMM
    return ELEMENTWISE if _ELEMENTWISE_OP.match(name) else UNKNOWN


def kind_of_kernel(name: str, around: Sequence[str] = ()) -> str:
    """The kind of what a CUDA device does under this name, given the names of what encloses its launch."""
    if re.match(r"memcpy (htod|dtoh)", name, re.I):
        return COPY
    if _COLLECTIVE.search(name):
        return COLLECTIVE
    if (served := _served(around)) is not None:
        return served
    for known, kind in (
        (_OPTIMIZER_KERNEL, OPTIMIZER),
        (_ATTENTION, ATTENTION),
        (_HEAD_KERNEL, HEAD),
        (_NORM, NORM),
        (_GEMM_KERNEL, GEMM),
        (_ELEMENTWISE_KERNEL, ELEMENTWISE),
    ):
        if known.search(name):
            return kind
    return UNKNOWN


def part_of_host(name: str) -> str:
    """What a piece of the host's own time between operators is spent in."""
    if _HOOK.match(name):
        return "DeepSpeed's hooks"
    if _OPERATOR.match(name):
        return "views and memory"
    return "autograd" if "Backward" in name or name.startswith(("autograd::", "torch::")) else "models and other Python"


def _served(around: Sequence[str]) -> str | None:
    """The kind that follows from what encloses an operator or a launch, None where its own name decides."""
    if any(map(_GATHERING.match, around)):
        return COLLECTIVE
    if OPTIMIZER_PHASE in around:
        return OPTIMIZER
    if any(map(_HEAD.search, around)):
        return HEAD
    if any(map(_ATTENTION.search, around)):
        return ATTENTION
    return NORM if NORM_RANGE in around else None


def _of_host(stack: Sequence[str]) -> str:
    """Of time between operators: waiting for batches in the phase of data, a compiled optimizer's update, or work."""
    if stack[-1] == DATA:
        return WAIT
    return OPTIMIZER if stack[-1].startswith(TORCH_OPTIMIZER) else HOST
