"""The reference model: whose weights, and when they are asked."""
