"""From the sparsities an allocator wishes to sparsities whose total is exact.

The wishes are shifted by one amount, then rounded to whole weights, rows or groups.
"""

from __future__ import annotations

from collections.abc import Mapping

_MOST = 0.99  # no matrix loses more than this share of its weights to an allocator


def balanced(wishes: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """The wishes in [0, 0.99], shifted by one amount so that their mean, weighted by size, is `sparsity`."""
    total = sparsity * sum(sizes.values())
    exact = abs(sum(wishes[n] * sizes[n] for n in sizes) - total) < 1e-6
    if exact and all(0 <= s < 1 for s in wishes.values()):
        return dict(wishes)
    low, high = -2.0, 2.0
    for _ in range(100):
        middle = (low + high) / 2
        lost = sum(min(max(wishes[n] + middle, 0.0), _MOST) * sizes[n] for n in sizes)
        low, high = (middle, high) if lost < total else (low, middle)
    return {n: min(max(wishes[n] + high, 0.0), _MOST) for n in sizes}


def rounded(
    shares: Mapping[str, float],
    sizes: Mapping[str, int],
    units: Mapping[str, int],
    total: int,
    at_least: int = 0,
) -> dict[str, int]:
    """How many whole units to prune of every matrix, near its share.

    The weights pruned add up to `total` as far as units allow.

    Args:
        shares: the sparsity wished, sizes: the weights, by matrix.
        units: weights per unit, by matrix: 1 where all weights of the matrix compete, R where those of a row
            do, R * C / M for N:M.
        total: weights to prune of all matrices together.
        at_least: units to prune of every matrix, and to leave in it.
    """
    steps = {n: shares[n] * sizes[n] / units[n] for n in sizes}
    most = {n: sizes[n] // units[n] - at_least for n in sizes}
    counts = {n: min(max(int(steps[n] + 1e-9), at_least), most[n]) for n in sizes}
    left = total - sum(counts[n] * units[n] for n in sizes)
    for n in sorted(sizes, key=lambda n: (counts[n] - steps[n], n)):  # the largest remainder first
        if left >= units[n] and counts[n] < most[n]:
            counts[n] += 1
            left -= units[n]
    return counts
