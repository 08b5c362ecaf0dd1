"""Rows to batches: text, then token pairs, then a plan, then tensors."""
