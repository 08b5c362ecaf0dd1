"""Train on rows that are in memory, and look at what came of it.

python examples/train_from_rows.py                    # or: deepspeed --num_gpus 2 examples/train_from_rows.py
"""

from pathlib import Path

from dsdpo import Run, evaluate, score, train
from dsdpo.commands.demo import make_inputs, make_rows

folder = Path("runs/examples")
make_inputs(folder)  # an untrained model of two layers; use a path or Hub id of your own
train_rows, held_out = make_rows(seed=0)  # dicts with prompt, chosen, rejected; a datasets.Dataset is as good

run = Run(
    model={"path": folder / "model", "dtype": "float32", "gradient_checkpointing": False},
    data={"train": train_rows, "eval": held_out, "max_length": 64},
    optimizer={"learning_rate": 1e-3},
    batch={"pairs_per_step": 32},
    evaluation={"every_steps": 20},
    checkpoint={"every_steps": 0},
    deepspeed={"zero_optimization": {"stage": 3}},
    output_dir=folder / "rows",
    overwrite_output_dir=True,
)
result = train(run)

first, last = result.metrics[0], result.metrics[-1]
print(f"loss {first['loss']:.3f} -> {last['loss']:.3f} in {result.step} steps")
print(f"held-out accuracy {result.last_evaluation['eval/rewards/accuracies']:.2f}, model in {result.model}")

# What was trained, from its folder: the same evaluation again, and each pair by itself.
again = evaluate(result.output_dir, data=held_out)
assert abs(again["eval/loss"] - result.last_evaluation["eval/loss"]) < 1e-4
margins = score(result.output_dir, data=held_out)["margin"]
assert abs(margins.mean() - again["eval/rewards/margins"]) < 1e-4
print(f"pairs it still gets wrong: {int((margins < 0).sum())} of {len(margins)}")
