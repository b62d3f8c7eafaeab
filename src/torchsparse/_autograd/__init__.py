"""Differentiable operations: each derivative is written once, over `_ops`."""
