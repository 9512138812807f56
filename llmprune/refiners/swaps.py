"""Exact swaps: per row, exchange a kept and a pruned weight while that lowers the layer's error, with the whole Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Step
from llmprune.numerics.gram import aim

# Legend: R rows, C columns, m columns of a group (N:M), d = w - v the error of a row's weights, c = G d, loss = d^T G d.
_CHUNK = (
    1 << 18
)  # rows are worked off in slices of about this many weights, which stay in the processor's cache
# Rows without a swap are left out after so many swaps: to know them, the host must wait for a GPU.
_LOOK = {"cpu": 1, "cuda": 16}


class Swaps(Step):
    """Second-order pair swaps on the mask of unchanged weights; monotone: the loss of no row ever rises.

    Pruning kept i and growing pruned j changes a row's loss by
    `2 v_i c_i + v_i^2 G_ii - 2 w_j c_j + w_j^2 G_jj - 2 v_i w_j G_ij`. Per step every row takes the better of two candidates: the best j
    with the best i for it, and the best i with the best j for it; within groups of m columns for N:M. All rows of a slice move together.
    """

    changes = "mask"
    visits, products = 1500, 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`max_swaps` per row. `tolerance`: a swap must lower the loss by this share of the row's first loss.

        `correction`: share of the dense model's inputs in what the outputs are to reproduce; the loss that falls is that one then.
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
        pulled = aim(job, self.config.correction)
        size = max(1, _CHUNK // keep.shape[1]) if keep.is_cpu else len(keep)
        for start in range(0, len(keep), size):
            part = slice(start, start + size)
            pull = pulled[part] - weight[part] @ job.stats.gram
            self._rows(job.weight[part], weight[part], keep[part], pull, job.stats.gram, job.pattern.width)
        return Pruned(weight, keep, pruned.score, pruned.notes)

    def _rows(
        self, dense: Tensor, weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, width: int
    ) -> None:
        """Swap in some rows until none has a swap left; weight and keep change in place."""
        first = dense - weight
        least = self.config.tolerance * torch.linalg.vecdot(first, first @ gram).clamp_min(
            torch.finfo(pull.dtype).tiny
        )
        active = torch.arange(len(keep), device=keep.device)
        look = _LOOK[keep.device.type]
        for swap in range(self.config.max_swaps):
            rows = _State(dense[active], weight[active], keep[active], pull[active], gram, width)
            gain, grown, dropped = rows.best_pair()
            better = gain < -least[active]
            if swap % look == look - 1:
                active, grown, dropped, better = (
                    active[better],
                    grown[better],
                    dropped[better],
                    better[better],
                )
                if not len(active):
                    break
            come, gone = dense[active, grown] * better, weight[active, dropped] * better
            pull[active] += gone[:, None] * gram[dropped] - come[:, None] * gram[grown]
            # A row without a swap has come and gone 0, and may name any two columns.
            keep[active, grown] |= better
            keep[active, dropped] &= ~better
            weight[active, grown] += come
            weight[active, dropped] -= gone


class _State:
    """Rows [r, C] between two swaps: what it would cost to prune each kept weight and to grow each pruned one, alone."""

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
        for_grow = self._partner(self._prune, self._weight, self._grow, self._dense, grow)
        for_prune = self._partner(self._grow, self._dense, self._prune, self._weight, prune)
        first = for_grow[0] <= for_prune[0]
        return (
            torch.minimum(for_grow[0], for_prune[0]),
            torch.where(first, grow, for_prune[1]),
            torch.where(first, for_grow[1], prune),
        )

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """The cheapest column to grow and the cheapest to prune; of the group where they are cheapest together for N:M."""
        if self._width == 1:
            return self._grow.argmin(dim=1), self._prune.argmin(dim=1)
        grow, prune = (cost.view(len(cost), -1, self._width).min(dim=2) for cost in (self._grow, self._prune))
        group = (grow.values + prune.values).argmin(dim=1, keepdim=True)
        grown, dropped = (best.indices.gather(1, group) + group * self._width for best in (grow, prune))
        return grown.squeeze(1), dropped.squeeze(1)

    def _partner(
        self, cost: Tensor, values: Tensor, other_cost: Tensor, other_values: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best partner of one column per row, with their joint interaction: change of the loss [r] and column [r]."""
        alone = other_cost.gather(1, other[:, None])
        reach = -2 * other_values.gather(1, other[:, None])
        if self._width == 1:
            gain, column = torch.addcmul(cost, values * self._gram[other], reach).min(dim=1)
        else:
            group = (other // self._width * self._width)[:, None] + torch.arange(
                self._width, device=other.device
            )
            interaction = self._gram[other[:, None], group] * values.gather(1, group) * reach
            gain, place = (cost.gather(1, group) + interaction).min(dim=1)
            column = group.gather(1, place[:, None]).squeeze(1)
        return gain + alone.squeeze(1), column
