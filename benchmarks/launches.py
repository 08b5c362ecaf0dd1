"""How many kernels a step launches, how long each may take, and how many shapes rows have: what CUDA graphs would need.

On paper: the operators of one pass of a Llama are counted without weights (torch's meta device), rows follow from the
plan of a step, and a step's time from its operations at a share of a device's peak.

    python -m benchmarks.launches [--gpu h100 --share 0.5]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import CASES, LONGEST, MIXES
from benchmarks.harness.common import Report, Spread, Table, parser
from benchmarks.harness.inputs import Size, llama_config, mixed_lengths
from benchmarks.harness.kinds import HOST, kind_of_operator
from dsdpo.data.binning import MicroBatchBudget
from dsdpo.data.plan import plan_step
from dsdpo.estimate.hardware import hardware

PASS_TOKENS = 4096  # of the pass whose operators are counted, which does not depend on it
ROUND_UP = (256, 2048)  # tokens that rows could be padded to a multiple of


def main() -> None:
    """Count and report."""
    options = parser("launches", "Kernels of a step, and shapes of its rows.", rounds=3, steps=100)
    options.add_argument("--gpu", default="h100", help="whose data sheet's peak counts")
    options.add_argument("--share", type=float, default=0.5, help="of that peak which a step reaches")
    options.add_argument("--pairs-per-step", type=int, default=64)
    options.add_argument("--tokens", type=int, nargs="+", default=[2048, 16_384], help="of a micro-batch")
    given = options.parse_args()
    report = Report("launches", "Kernels of a step and shapes of its rows", given)
    columns = ("model", "tokens of a micro-batch", "kernels of a micro-batch", "ms", "µs a kernel")
    models = {"1B": CASES["1b"].size, "8B": CASES["8b-lora"].size}
    rows = tuple(launch_row(name, size, tokens, given) for name, size in models.items() for tokens in given.tokens)
    note = (
        "Forward, recomputation and backward of the policy with all weights trained, and the reference's forward, of "
        f"operators that compute. Time: the formulas' operations at {given.share:.0%} of {given.gpu}'s peak."
    )
    report.table(Table("Kernels", columns, rows, note))
    padded = tuple(f"padding to {size}" for size in ROUND_UP)
    columns = ("mix", "tokens of a micro-batch", "micro-batches", "lengths", *padded, "to the budget")
    rows = tuple(shape_row(mix, tokens, given) for mix in MIXES for tokens in given.tokens)
    note = (
        f"Of {given.steps} steps: how many different lengths rows have, and what rounding them up would add to their "
        "tokens."
    )
    report.table(Table(f"Rows of {given.pairs_per_step} pairs a step on one rank", columns, rows, note))
    report.write()


def launch_row(name: str, size: Size, tokens: int, given: argparse.Namespace) -> tuple[str, ...]:
    """A model's kernels in a micro-batch of so many tokens."""
    one, two = (operators(size, layers) for layers in (1, 2))
    a_layer = {kind: two[kind] - one[kind] for kind in one}
    of = {kind: one[kind] + (size.layers - 1) * a_layer[kind] for kind in one}
    kernels = 2 * of["forward"] + of["whole"]  # recomputation and the reference are forward passes too
    weights = (
        size.layers * layer_weights(size) + size.hidden * size.vocabulary / 2
    )  # about half of the tokens are scored
    seconds = 8 * weights * tokens / (given.share * 1e12 * hardware(given.gpu, ranks_per_node=1).tflops)
    return name, f"{tokens}", f"{kernels}", f"{1000 * seconds:.0f}", f"{1e6 * seconds / kernels:.0f}"


def layer_weights(size: Size) -> float:
    """Elements of a layer's matrices."""
    wide = size.intermediate or 8 * size.hidden // 3 // 16 * 16
    return 2.0 * size.hidden**2 + 2 * size.hidden**2 * size.kv_heads / size.heads + 3 * size.hidden * wide


def operators(size: Size, layers: int) -> dict[str, int]:
    """Operators that compute in a forward pass of a model with so many layers, and in one with its backward pass."""
    import torch
    from transformers import AttentionInterface, AutoModel

    AttentionInterface.register("counted", counted_attention)
    with torch.device("meta"):
        config = llama_config(size, layers=layers)
        model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="counted")
        hidden = torch.zeros(1, PASS_TOKENS, size.hidden, dtype=torch.bfloat16, requires_grad=True)
        places = torch.arange(PASS_TOKENS)[None]
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        found = {}
        for name in ("forward", "whole"):
            with Counting() as counting:
                out = model(inputs_embeds=hidden, position_ids=places, attention_mask=mask, use_cache=False)[0]
                if name == "whole":
                    out.backward(torch.empty_like(out))
            found[name] = counting.counted
    return found


class Counting(TorchDispatchMode):
    """Counts operators that compute, of autograd's backward passes too."""

    counted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted += kind_of_operator(("forward_backward", f"aten::{func.overloadpacket.__name__}")) != HOST
        return func(*args, **(kwargs or {}))


class OneKernel(torch.autograd.Function):
    """In place of attention over packed rows: one operator forward, and one backward."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        ctx.save_for_backward(key, value)
        return query.neg()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        key, value = ctx.saved_tensors
        return grads[0].neg(), torch.empty_like(key), torch.empty_like(value)


def counted_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """As transformers calls attention; the keys of shared beginnings are copied for each sequence."""
    places = torch.arange(key.shape[2], device="meta")
    key, value = (part.index_select(2, places) for part in (key, value))
    return OneKernel.apply(query, key, value).transpose(1, 2), None


def shape_row(mix: str, tokens: int, given: argparse.Namespace) -> tuple[str, ...]:
    """The lengths of a mix's rows."""
    prompt, response, sigma = MIXES[mix]
    found: list[list[float]] = []
    for seed in range(given.rounds):
        sizes = {"prompt": prompt, "response": response, "longest": LONGEST}
        lengths = mixed_lengths(given.steps * given.pairs_per_step, sigma=sigma, seed=seed, **sizes)
        rows = np.array(row_lengths(lengths, tokens, given.pairs_per_step))
        padded = [100 * (float((-(-rows // size) * size).sum()) / rows.sum() - 1) for size in (*ROUND_UP, tokens)]
        found.append([len(rows), len(set(rows.tolist())), *padded])
    count, distinct, *added = (Spread.of(values) for values in zip(*found, strict=True))
    return mix, f"{tokens}", count.text(0), distinct.text(0), *(share.text(1, " %") for share in added)


def row_lengths(lengths: np.ndarray, tokens: int, pairs_per_step: int) -> list[int]:
    """Tokens of each packed row of the steps on these pairs, on one rank."""
    sizes = lengths.sum(1) - 2
    found: list[int] = []
    for start in range(0, len(lengths) - pairs_per_step + 1, pairs_per_step):
        plan = plan_step(
            lengths, consumed_pairs=start, pairs_per_step=pairs_per_step, world_size=1,
            budget=MicroBatchBudget(tokens=tokens), seed=0, shuffle=False, layout="packed",
        )  # fmt: skip
        found += [int(sizes[list(batch)].sum()) for batch in plan.micro_batches[0]]
    return found


if __name__ == "__main__":
    main()
