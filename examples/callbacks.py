"""Follow a run with callbacks, stop it when it is good enough, and go on with it later.

python examples/callbacks.py                          # or: deepspeed --num_gpus 2 examples/callbacks.py
"""

from pathlib import Path

from dsdpo import Event, Run, train
from dsdpo.commands.demo import make_inputs

folder = Path("runs/examples")
make_inputs(folder)
run = Run(
    model={"path": folder / "model", "dtype": "float32", "gradient_checkpointing": False},
    data={"train": folder / "train.jsonl", "eval": folder / "test.jsonl", "max_length": 64},
    optimizer={"learning_rate": 1e-3},
    batch={"pairs_per_step": 32},
    evaluation={"every_steps": 10},
    checkpoint={"every_steps": 10},
    deepspeed={"zero_optimization": {"stage": 2}},
    output_dir=folder / "callbacks",
    overwrite_output_dir=True,
)


def stop_above(accuracy: float):
    """A callback that ends the run once the held-out accuracy is above this."""

    def look(event: Event) -> None:
        if event.metrics["eval/rewards/accuracies"] > accuracy:
            event.stop()  # saves and stops after this step, on all ranks

    return look


def note_checkpoint(event: Event) -> None:
    """Runs on rank 0 alone, while the other ranks wait: copy the checkpoint, tell a queue, ..."""
    print(f"step {event.step} of {event.total_steps}: {event.checkpoint}")


stopped = train(run, on_evaluate=stop_above(0.6), on_save=note_checkpoint, quiet=True)
print(f"stopped after step {stopped.step} by {stopped.stopped}")

finished = train(Run(run.to_dict(), overwrite_output_dir=False, checkpoint={"resume": "auto"}), quiet=True)
print(f"went on to step {finished.step}; model in {finished.model}")
