"""Train with a loss of your own; `type: [capped, sft]` would add one of dsdpo's to it.

python examples/own_loss.py                           # or: deepspeed --num_gpus 2 examples/own_loss.py
"""

from pathlib import Path

from torch import Tensor

from dsdpo import PairLogps, Run, register_loss, train
from dsdpo.commands.demo import make_inputs

folder = Path("runs/examples")
make_inputs(folder)


@register_loss
def capped(policy: PairLogps, reference: PairLogps, *, beta: float | Tensor, cap: float = 1.0) -> Tensor:
    """A hinge on the margin of rewards, (B,): pairs whose margin is above `cap` teach nothing more."""
    rewards = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
    return (cap - (rewards[0] - rewards[1])).clamp(min=0)


result = train(
    Run(
        model={"path": folder / "model", "dtype": "float32", "gradient_checkpointing": False},
        data={"train": folder / "train.jsonl", "eval": folder / "test.jsonl", "max_length": 64},
        loss={"type": "capped", "options": {"cap": 2.0}},
        optimizer={"learning_rate": 1e-3},
        batch={"pairs_per_step": 32},
        train={"max_steps": 40},
        evaluation={"every_steps": 0},
        checkpoint={"every_steps": 0},
        deepspeed={"zero_optimization": {"stage": 2}},
        output_dir=folder / "own-loss",
        overwrite_output_dir=True,
    ),
    quiet=True,
)
# Policy and reference start alike: every margin is 0, and the hinge is its cap.
assert abs(result.metrics[0]["loss"] - 2.0) < 1e-3
print(f"loss {result.metrics[0]['loss']:.3f} -> {result.metrics[-1]['loss']:.3f}")
