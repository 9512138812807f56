"""Sparsity patterns (unstructured, N:M): turn a score into a keep mask with an exact count.

R rows, K columns of a slice of a matrix.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from llmprune.common.messages import shown
from llmprune.contracts import Pattern
from llmprune.numerics.counts import true_per_row

SCOPES = ("row", "matrix", "published")
# On a CPU, rows are processed in slices of about this many weights. They fit into the cache, and torch runs
# operations of this size on one thread: starting a second one thousands of times costs more than it gains,
# most of all on a busy machine.
_CHUNK = 1 << 16
_WIDEST = 64  # the largest M of an N:M that is looked for in a mask


def _threshold(score: Tensor, pruned: int) -> Tensor:
    """The `pruned`-th lowest value of each row, [R, 1]."""
    if score.is_cpu and score.dtype == torch.float32:
        # numpy's partial selection is vectorised: several times faster than kthvalue.
        partitioned = np.partition(score.numpy(), pruned - 1, axis=1)
        return torch.from_numpy(partitioned[:, pruned - 1 : pruned].copy())
    return torch.kthvalue(score, pruned, dim=1, keepdim=True).values


def keep_highest(score: Tensor, pruned: int) -> Tensor:
    """Keep mask [R, K] that drops exactly the `pruned` lowest of each row.

    Of equal scores the lower column goes first.

    Only the threshold of each row is searched, nothing is sorted. Rows with several scores at the threshold
    are the only ones where columns are counted.
    """
    keep = torch.ones_like(score, dtype=torch.bool)
    if pruned == 0:
        return keep
    kept = score.shape[1] - pruned
    rows = max(1, _CHUNK // score.shape[1]) if score.is_cpu else score.shape[0]
    for part, part_keep in zip(score.split(rows), keep.split(rows), strict=True):
        threshold = _threshold(part, pruned)
        torch.gt(part, threshold, out=part_keep)
        surplus = kept - part_keep.count_nonzero(dim=1)
        tied = surplus.nonzero().squeeze(1)
        if len(tied):
            equal = part[tied] == threshold[tied]
            # Of the scores at the threshold, those in the last `surplus` columns are kept.
            number_from_right = equal.flip(1).cumsum(1).flip(1)
            part_keep[tied] |= equal & (number_from_right <= surplus[tied, None])
    return keep


def keep_highest_of_group(score: Tensor, n: int, m: int) -> Tensor:
    """Keep mask [R, K] with the n highest of every aligned group of m columns.

    Of equal scores the higher column is kept.
    """
    keep = torch.empty_like(score, dtype=torch.bool)
    size = _CHUNK // m if score.is_cpu else max(1, score.numel() // m)
    for part, part_keep in zip(score.reshape(-1, m).split(size), keep.view(-1, m).split(size), strict=True):
        columns = part.T.contiguous()  # one contiguous row per position in the group
        # How many of its group come before each entry: those that are higher, or equal and further right.
        rank = torch.zeros_like(columns, dtype=torch.int16)
        for j in range(m):
            rank[j + 1 :] += columns[j] > columns[j + 1 :]
            rank[:j] += columns[j] >= columns[:j]
        part_keep.copy_((rank < n).T)
    return keep


class Unstructured(Pattern):
    """Any position may be pruned. Scores are compared within each row, or over the whole matrix (`scope`).

    Pruned are `int(C * sparsity)` weights of each row, or `int(R * C * sparsity)` of the matrix.
    """

    width = 1

    def __init__(self, scope: str = "row") -> None:
        if scope not in SCOPES:  # "published" has a class of its own, `PublishedThreshold`
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {shown(scope)}")
        self.scope = scope

    def _pruned(self, rows: int, start: int, columns: int, sparsity: float) -> int:
        factor = 1 if self.scope == "row" else rows
        return int(factor * (start + columns) * sparsity) - int(factor * start * sparsity)

    def select(self, score: Tensor, sparsity: float, start: int = 0) -> Tensor:
        pruned = self._pruned(score.shape[0], start, score.shape[1], sparsity)
        if self.scope == "row":
            return keep_highest(score, pruned)
        return keep_highest(score.reshape(1, -1), pruned).view_as(score)

    def check(self, keep: Tensor, sparsity: float) -> None:
        wanted = self._pruned(keep.shape[0], 0, keep.shape[1], sparsity)
        counts = keep.shape[1] - true_per_row(keep)
        counts = counts if self.scope == "row" else counts.sum().reshape(1)
        if not bool((counts == wanted).all()):
            off = int(counts[(counts != wanted).nonzero()[0, 0]])
            raise ValueError(f"the mask prunes {off} weights of a {self.scope} where {wanted} are wanted")

    def __str__(self) -> str:
        return "unstructured"


class PublishedThreshold(Unstructured):
    """For reproducing published numbers only: prunes `score <= threshold`.

    The published code for magnitude pruning and SparseGPT does so. Scores are compared over a matrix or a
    slice of it. The threshold is entry `int(n * sparsity)` of the n sorted scores, so each slice loses one
    weight too many, and more where scores are equal.
    """

    def __init__(self) -> None:
        super().__init__("matrix")

    def select(self, score: Tensor, sparsity: float, start: int = 0) -> Tensor:
        return score > torch.kthvalue(score.flatten(), int(score.numel() * sparsity) + 1).values

    def check(self, keep: Tensor, sparsity: float) -> None:
        pruned, wanted = keep.numel() - int(true_per_row(keep).sum()), int(keep.numel() * sparsity)
        if pruned < wanted:
            raise ValueError(
                f"the mask prunes {pruned} weights of a matrix where at least {wanted} are wanted"
            )


class NM(Pattern):
    """N:M sparsity: in every aligned group of m columns of a row exactly n weights are kept."""

    def __init__(self, n: int, m: int) -> None:
        if not 0 < n < m:
            raise ValueError(f"an N:M pattern keeps N of M with 0 < N < M, got {n}:{m}")
        self.n, self.width = n, m

    @property
    def sparsity(self) -> float:
        """The sparsity that the pattern implies, `1 - n / m`."""
        return 1 - self.n / self.width

    def select(self, score: Tensor, sparsity: float, start: int = 0) -> Tensor:
        self._check_width(score)
        return keep_highest_of_group(score, self.n, self.width)

    def check(self, keep: Tensor, sparsity: float) -> None:
        self._check_width(keep)
        counts = true_per_row(keep.reshape(-1, self.width))
        if not bool((counts == self.n).all()):
            raise ValueError(
                f"a group of {self.width} keeps {int(counts[counts != self.n][0])} weights "
                f"where {self.n} are wanted"
            )

    def _check_width(self, matrix: Tensor) -> None:
        if matrix.shape[1] % self.width:
            raise ValueError(
                f"in_features {matrix.shape[1]} is not divisible by {self.width}, as pattern {self} requires"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.width}"


def parse(text: str, scope: str = "row") -> Pattern:
    """The pattern named `unstructured` or `N:M`. Raises `ValueError` on anything else."""
    if text == "unstructured":
        return PublishedThreshold() if scope == "published" else Unstructured(scope)
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", str(text))
    if not match:
        raise ValueError(f"pattern must be 'unstructured' or 'N:M' (2:4, 4:8, ...), got {shown(text)}")
    return NM(int(match[1]), int(match[2]))


def exact_pattern(keep: Tensor) -> NM | None:
    """The N:M pattern that a keep mask [R, C] satisfies exactly, with the smallest M up to 64; else None."""
    columns = keep.shape[1]
    # Of a single group in a row nothing tells whether it is one, or a row that keeps so many.
    for width in (w for w in range(2, min(_WIDEST, columns // 2) + 1) if columns % w == 0):
        kept = int(keep[0, :width].sum())
        if not 0 < kept < width or bool((true_per_row(keep[:1].reshape(-1, width)) != kept).any()):
            continue  # the first row tells of most masks
        if bool((true_per_row(keep.reshape(-1, width)) == kept).all()):
            return NM(kept, width)
    return None
