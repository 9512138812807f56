"""Arithmetic that algorithms share: Gram matrices, counting, orders of columns."""
