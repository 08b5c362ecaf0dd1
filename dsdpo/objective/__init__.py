"""Tensors to loss. Knows nothing of DeepSpeed."""
