"""Recounts zeros and N:M groups from disk, trusting neither the record nor the masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune.checkpoint.reader import WeightSource
from llmprune.numerics.counts import true_per_row, zeros_of

_WIDTHS = (4, 8, 16)


@dataclass(frozen=True)
class Count:
    """Zeros of one matrix as stored, and per M the most weights that any group of M neighbouring inputs holds."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    most: Mapping[int, int]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])


def patterns(counts: Iterable[Count]) -> list[str]:
    """The N:M patterns that every group of all these matrices satisfies, the tightest for each M ("2:4": at most 2 of 4 are not zero).

    More than three quarters kept is no pattern worth a name.
    """
    widest = {m: max(c.most.get(m, m) for c in counts) for m in _WIDTHS} if (counts := list(counts)) else {}
    return [f"{max(1, n)}:{m}" for m, n in widest.items() if 4 * n <= 3 * m]


def _most(weight: Tensor) -> dict[int, int]:
    kept = weight != 0
    return {m: int(true_per_row(kept.view(-1, m)).max()) for m in _WIDTHS if weight.shape[1] % m == 0}


def recount(source: WeightSource, transposed: frozenset[str], names: list[str]) -> list[Count]:
    """Count the named 2-D weights, one in memory at a time; `transposed` ones are stored as [C, R]."""
    counts = []
    for name in names:
        weight = source.load(name)
        weight = weight.T.contiguous() if name in transposed else weight
        counts.append(Count(name, tuple(weight.shape), zeros_of(weight), _most(weight)))
    return counts
