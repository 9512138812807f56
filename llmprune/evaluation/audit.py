"""Recounts zeros and N:M groups of the stored weights, without relying on the record or the masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune.checkpoint.reader import WeightSource
from llmprune.model.target import Target
from llmprune.numerics.counts import true_per_row, zeros_of

_WIDTHS = (4, 8, 16)  # the M of the N:M patterns that are looked for


@dataclass(frozen=True)
class Count:
    """What was counted in one matrix.

    Attributes:
        name: of the stored tensor.
        shape: (outputs R, inputs C).
        zeros: the number of zero weights.
        most: for each M, the largest number of nonzero weights in any group of M neighbouring inputs.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    most: Mapping[int, int]

    @property
    def weights(self) -> int:
        """The number of weights, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.weights


def patterns(counts: Iterable[Count]) -> list[str]:
    """The N:M patterns that all these matrices satisfy, for each M the one with the smallest N.

    "2:4" means that at most 2 of 4 neighbouring weights are nonzero. Patterns that keep more than three
    quarters of the weights are left out.
    """
    counts = list(counts)
    widest = {m: max(count.most.get(m, m) for count in counts) for m in _WIDTHS} if counts else {}
    return [f"{max(1, n)}:{m}" for m, n in widest.items() if 4 * n <= 3 * m]


def _most(weight: Tensor) -> dict[int, int]:
    """`Count.most` of a weight [R, C]."""
    nonzero = weight != 0
    return {m: int(true_per_row(nonzero.view(-1, m)).max()) for m in _WIDTHS if weight.shape[1] % m == 0}


def recount(source: WeightSource, targets: Iterable[Target]) -> list[Count]:
    """Count some matrices, with one tensor in memory at a time."""
    counts: list[Count] = []
    loaded: tuple[str, Tensor] | None = None
    for target in targets:
        if loaded is None or loaded[0] != target.tensor:
            loaded = target.tensor, source.load(target.tensor)
        weight = target.oriented(target.part(loaded[1])).contiguous()
        counts.append(Count(target.key, tuple(weight.shape), zeros_of(weight), _most(weight)))
    return counts
