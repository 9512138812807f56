"""Exact swaps: per row, exchange a kept and a pruned weight while that lowers the layer's error, with the
whole Gram matrix.

R rows, r rows of a slice, C columns, m columns of a group (N:M). W is the dense matrix, V the pruned one,
G the Gram matrix. A row of weights w, pruned to v, has the error d = w - v, c = G d, and the loss d^T G d.
"Grow" means to keep a weight that the mask had pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Step
from llmprune.numerics.gram import aim

# On a CPU, rows are processed in slices of about this many weights, which stay in the processor's cache.
_CHUNK = 1 << 18
# Finished rows are left out every so many swaps. On a GPU
# rarely, since the host must wait for it to know them.
_LOOK = {"cpu": 1, "cuda": 16}


class Swaps(Step):
    """Swaps a kept and a pruned weight of a row where that lowers the row's loss; no row's loss ever rises.

    Pruning kept weight i and growing pruned weight j changes a row's loss by
    `2 v_i c_i + v_i^2 G_ii - 2 w_j c_j + w_j^2 G_jj - 2 v_i w_j G_ij`.
    In each step every row takes the better of two pairs: the j that is best alone with its best i, and the i
    that is best alone with its best j; for N:M within one group of m columns. The other kept weights do not
    change. All rows of a slice take their steps together.
    """

    changes = "mask"
    visits, products = 1500, 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of exact swaps.

        Attributes:
            max_swaps: most swaps per row.
            tolerance: a swap must lower the loss by this share of the row's first loss.
            correction: in [0, 1], how far the wanted outputs, against which the loss is measured, are those
                on the dense model's inputs; see `aim`.
        """

        max_swaps: int = 1000
        tolerance: float = 1e-5
        correction: float = 0.0

        def __post_init__(self) -> None:
            if self.max_swaps < 1:
                raise ValueError(f"max_swaps must be at least 1, got {self.max_swaps}")
            if not self.tolerance > 0:
                raise ValueError(f"tolerance must be above 0, got {self.tolerance}")
            if not 0 <= self.correction <= 1:
                raise ValueError(f"correction must be in [0, 1], got {self.correction}")

    @property
    def needs(self) -> Need:  # type: ignore[override]
        return Need.GRAM | (Need.CROSS if self.config.correction else Need.NONE)

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        keep, weight = pruned.keep.clone(), pruned.weight.clone()
        product = aim(job, self.config.correction)
        size = max(1, _CHUNK // keep.shape[1]) if keep.is_cpu else len(keep)
        for start in range(0, len(keep), size):
            part = slice(start, start + size)
            pull = product[part] - weight[part] @ job.stats.gram
            self._rows(job.weight[part], weight[part], keep[part], pull, job.stats.gram, job.pattern.width)
        return Pruned(weight, keep, pruned.score, pruned.notes)

    def _rows(
        self, dense: Tensor, weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, width: int
    ) -> None:
        """Swap in some rows [r, C] until no swap lowers a loss.

        Changes `weight`, `keep`, `pull` (c) in place.
        """
        first = dense - weight
        first_loss = torch.linalg.vecdot(first, first @ gram)
        least = self.config.tolerance * first_loss.clamp_min(torch.finfo(pull.dtype).tiny)
        active = torch.arange(len(keep), device=keep.device)
        look = _LOOK[keep.device.type]
        for swap in range(self.config.max_swaps):
            rows = _State(dense[active], weight[active], keep[active], pull[active], gram, width)
            change, grown, dropped = rows.best_pair()
            better = change < -least[active]
            if swap % look == look - 1:
                active, grown, dropped = active[better], grown[better], dropped[better]
                better = better[better]
                if not len(active):
                    break
            # Both are 0 in a row without a better swap, so its columns do not matter.
            added, removed = dense[active, grown] * better, weight[active, dropped] * better
            pull[active] += removed[:, None] * gram[dropped] - added[:, None] * gram[grown]
            keep[active, grown] |= better
            keep[active, dropped] &= ~better
            weight[active, grown] += added
            weight[active, dropped] -= removed


class _State:
    """Some rows [r, C] between two swaps: how pruning or growing each weight alone would change the loss."""

    def __init__(
        self, dense: Tensor, weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, width: int
    ) -> None:
        self._dense, self._weight, self._gram, self._width = dense, weight, gram, width
        diagonal = gram.diagonal()
        self._prune = (2 * pull + weight * diagonal).mul_(weight).masked_fill_(~keep, torch.inf)
        self._grow = (dense * diagonal - 2 * pull).mul_(dense).masked_fill_(keep, torch.inf)

    def best_pair(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per row [r]: the change of the loss, the column to grow, the column to prune."""
        grow, prune = self._candidates()
        change_of_grow, prune_for_grow = self._partner(
            self._prune, self._weight, self._grow, self._dense, grow
        )
        change_of_prune, grow_for_prune = self._partner(
            self._grow, self._dense, self._prune, self._weight, prune
        )
        from_grow = change_of_grow <= change_of_prune
        return (
            torch.minimum(change_of_grow, change_of_prune),
            torch.where(from_grow, grow, grow_for_prune),
            torch.where(from_grow, prune_for_grow, prune),
        )

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """The column that is best to grow alone and the one that is best to prune alone, [r] each.

        For N:M both are of one group: that in which their changes of the loss have the lowest sum.
        """
        if self._width == 1:
            return self._grow.argmin(dim=1), self._prune.argmin(dim=1)
        grow, prune = (cost.view(len(cost), -1, self._width).min(dim=2) for cost in (self._grow, self._prune))
        group = (grow.values + prune.values).argmin(dim=1, keepdim=True)
        grown, dropped = (best.indices.gather(1, group) + group * self._width for best in (grow, prune))
        return grown.squeeze(1), dropped.squeeze(1)

    def _partner(
        self, cost: Tensor, values: Tensor, other_cost: Tensor, other_values: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best second column of a swap, given its first: change of the loss [r] and second column [r].

        Args:
            cost: change of the loss from each possible second column alone, [r, C].
            values: their weights, [r, C].
            other_cost: as `cost`, for the first column.
            other_values: as `values`, for the first column.
            other: the first column of each row, [r].
        """
        alone = other_cost.gather(1, other[:, None])
        factor = -2 * other_values.gather(1, other[:, None])
        if self._width == 1:
            change, column = torch.addcmul(cost, values * self._gram[other], factor).min(dim=1)
        else:
            offsets = torch.arange(self._width, device=other.device)
            group = (other // self._width * self._width)[:, None] + offsets
            interaction = self._gram[other[:, None], group] * values.gather(1, group) * factor
            change, position = (cost.gather(1, group) + interaction).min(dim=1)
            column = group.gather(1, position[:, None]).squeeze(1)
        return change + alone.squeeze(1), column
