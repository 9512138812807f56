"""Recounts zeros and N:M groups from disk, trusting neither the record nor the masks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.checkpoint.reader import WeightSource
from llmprune.counts import true_per_row, zeros_of

GROUPS = ((1, 4), (2, 4), (2, 8), (4, 8), (8, 16))


@dataclass(frozen=True)
class Count:
    """Zeros of one matrix as stored, and the N:M patterns it satisfies in every group ("2:4": at most 2 of 4 are not zero)."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    patterns: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])


def satisfied(weight: Tensor) -> tuple[str, ...]:
    """The N:M patterns a matrix [R, C] satisfies; none for a dense one."""
    kept = weight != 0
    return tuple(f"{n}:{m}" for n, m in GROUPS if weight.shape[1] % m == 0 and bool((true_per_row(kept.view(-1, m)) <= n).all()))


def recount(source: WeightSource, transposed: frozenset[str], names: list[str]) -> list[Count]:
    """Count the named 2-D weights, one in memory at a time; `transposed` ones are stored as [C, R]."""
    counts = []
    for name in names:
        weight = source.load(name)
        weight = weight.T.contiguous() if name in transposed else weight
        counts.append(Count(name, tuple(weight.shape), zeros_of(weight), satisfied(weight)))
    return counts
