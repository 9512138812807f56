"""The toy problem of the tests of training with sparsity, and what these tests compare with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from recovery_oracles import AdamW, Sparsity, Step, top

ROWS, COLUMNS, STEPS = 4, 8, 12
RATES = [0.05 / (1 + 0.1 * t) for t in range(STEPS)]
Batch = tuple[np.ndarray, np.ndarray]


def problem(
    seed: int = 0, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[np.ndarray, np.ndarray, list[Batch]]:
    """A weight, its keep mask of half of each row by magnitude, and three batches of inputs and targets."""
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(rows, columns))
    batches = [(draw.normal(size=(16, columns)), draw.normal(size=(16, rows))) for _ in range(3)]
    return weight, top(np.abs(weight), 0.5), batches


def mean_square(batch: Batch) -> Callable[[np.ndarray], float]:
    """The loss of the toy problem for a weight: the mean of (X V^T - Y)^2."""
    return lambda weight: float(((batch[0] @ weight.T - batch[1]) ** 2).mean())


def numeric(function: Callable[[np.ndarray], float], point: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of function(point) by central differences, shaped like point."""
    result = np.zeros(point.shape)
    for index in np.ndindex(point.shape):
        there = point.copy()
        there[index] += step
        above = function(there)
        there[index] -= 2 * step
        result[index] = (above - function(there)) / (2 * step)
    return result


def assert_same(left: list[Step], right: list[Step]) -> None:
    """Two histories of one tensor have equal masks, and equal values up to rounding."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.keep, b.keep)
        np.testing.assert_allclose(a.theta, b.theta, atol=1e-12)
        np.testing.assert_allclose(a.weight, b.weight, atol=1e-12)


def assert_exact(keep: np.ndarray, sparsity: Sparsity) -> None:
    """The mask prunes exactly what the sparsity, or the pattern (n, m), says."""
    if isinstance(sparsity, tuple):
        n, m = sparsity
        assert (keep.reshape(len(keep), -1, m).sum(axis=2) == n).all()
    else:
        assert ((~keep).sum(axis=1) == int(keep.shape[1] * sparsity)).all()


class Recorded:
    """A `make` for AdamW whose optimizers can be looked at afterwards, in `made`."""

    def __init__(self) -> None:
        self.made: list[AdamW] = []

    def make(self) -> AdamW:
        self.made.append(AdamW())
        return self.made[-1]
