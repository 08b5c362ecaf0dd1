"""The run: loop, evaluation, metrics, tracking, checkpoints, export."""
