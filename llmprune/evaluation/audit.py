"""Recounts zeros and N:M groups of the stored weights, without relying on the record or the masks.

And compares masks with the weights, and with one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmprune.checkpoint.masks import KeepMasks
from llmprune.checkpoint.reader import WeightSource
from llmprune.common.messages import shown
from llmprune.model.masking import Masking
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


def _weights(source: WeightSource, targets: Iterable[Target]) -> Iterator[tuple[Target, Tensor]]:
    """Some matrices as [R, C], with one tensor in memory at a time."""
    loaded: tuple[str, Tensor] | None = None
    for target in targets:
        if loaded is None or loaded[0] != target.tensor:
            loaded = target.tensor, source.load(target.tensor)
        yield target, target.oriented(target.part(loaded[1])).contiguous()


def recount(source: WeightSource, targets: Iterable[Target]) -> list[Count]:
    """Count some matrices."""
    return [
        Count(target.key, tuple(weight.shape), zeros_of(weight), _most(weight))
        for target, weight in _weights(source, targets)
    ]


def filled(source: WeightSource, masking: Masking) -> list[dict[str, Any]]:
    """For every matrix with a mask: how many weights it prunes, and how many of those are not zero."""
    found = []
    for target, weight in _weights(source, masking.targets):
        pruned = ~masking.keep(target.name)
        counts = {"pruned": int(pruned.sum()), "filled": int((weight[pruned] != 0).sum())}
        found.append({"name": target.key, "shape": list(target.shape), **counts})
    return found


def compare_masks(a: KeepMasks, b: KeepMasks) -> dict[str, Any]:
    """Two files of masks side by side, per matrix that both have and over all of them.

    Raises:
        ValueError: no matrix in common, or one of another shape.
    """
    common = [name for name in a.shapes if name in b.shapes]
    if not common:
        first, second = (shown(next(iter(masks.shapes))) for masks in (a, b))
        raise ValueError(
            f"{a.path} and {b.path} have no matrix in common (the first has {first}, the second {second}); "
            "compare masks of the same model"
        )
    for name in common:
        if a.shapes[name] != b.shapes[name]:
            sizes = [" x ".join(map(str, masks.shapes[name])) for masks in (a, b)]
            raise ValueError(
                f"{name} is {sizes[0]} in {a.path} and {sizes[1]} in {b.path}; "
                "compare masks of the same model"
            )
    matrices = []
    for name in common:
        one, other = ~a.load(name), ~b.load(name)
        counts = [one.numel(), *(int(part.sum()) for part in (one, other, one & other))]
        matrices.append({"name": name, "shape": list(one.shape), **overlap_of(*counts)})
    keys = ("weights", "pruned_a", "pruned_b", "both")
    return {
        "matrices": matrices,
        **overlap_of(*(sum(m[key] for m in matrices) for key in keys)),
        "only_a": [name for name in a.shapes if name not in b.shapes],
        "only_b": [name for name in b.shapes if name not in a.shapes],
    }


def overlap_of(weights: int, pruned_a: int, pruned_b: int, both: int) -> dict[str, Any]:
    """Two sets of pruned weights in figures; an empty set lies wholly in the other one."""
    either, smaller = pruned_a + pruned_b - both, min(pruned_a, pruned_b)
    return {
        "weights": weights,
        "pruned_a": pruned_a,
        "pruned_b": pruned_b,
        "both": both,
        "agree": 1 - (either - both) / weights,
        "overlap": both / smaller if smaller else 1.0,
        "jaccard": both / either if either else 1.0,
    }
