"""Exchange of weights at a fixed sparsity: some of the kept ones are dropped, and as many others grow."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.patterns import Unstructured
from llmprune.recovery.parts import MaskRule, View


class Exchange(MaskRule):
    """Drops a share of the kept weights, and lets those grow whose `growth` is highest.

    Survivors have a score of infinity, so that one selection drops and grows exactly as many; for N:M within
    each group.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of every exchange.

        Attributes:
            drop: `magnitude` drops the smallest; `set` half of them among the smallest positive, half among
                the least negative (SET).
        """

        drop: str = "magnitude"

        def __post_init__(self) -> None:
            if self.drop not in ("magnitude", "set"):
                raise ValueError(f"drop must be magnitude or set, got {self.drop!r}")

    @abstractmethod
    def growth(self, view: View) -> Tensor:
        """What each weight is worth as one that grows, [R, C]."""

    def score(self, view: View) -> Tensor:
        survivors = self.survivors(view)
        growth = self.growth(view).to(torch.float32)
        return torch.where(survivors, torch.inf, growth)

    def survivors(self, view: View) -> Tensor:
        """The kept weights without those that are dropped, bool [R, C].

        Dropped are `floor(share * kept)` of each row, of the whole matrix where its counts are of the whole;
        and the smallest where more are left than the new mask keeps.
        """
        assert view.aim is not None
        pattern, keep, size = view.aim[0], view.keep, view.weight.abs()
        whole = isinstance(pattern, Unstructured) and pattern.scope == "matrix"
        rows = (1, -1) if whole else keep.shape
        dropped = self._dropped(keep.reshape(rows), view.weight.reshape(rows), view.phase.share)
        left = keep & ~dropped.view_as(keep)
        return left & pattern.select(torch.where(left, size, -1.0), view.aim[1])

    def _dropped(self, keep: Tensor, weight: Tensor, share: float) -> Tensor:
        """The kept weights of each row that are dropped, bool."""
        size = weight.abs()
        count = (keep.sum(dim=1).double() * share).floor().long()
        if self.config.drop == "magnitude":
            return _smallest(size, keep, count)
        # Of the positive ones the smallest half, of the negative ones the other, as far as there are so many.
        positive, negative = keep & (weight >= 0), keep & (weight < 0)
        half = torch.minimum(positive.sum(dim=1), count - count // 2)
        first = torch.maximum(half, count - negative.sum(dim=1))
        return _smallest(size, positive, first) | _smallest(size, negative, count - first)


def _smallest(size: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` smallest of each row, [R, C], among some; of equal ones those of the lower columns."""
    order = torch.where(among, size, torch.inf).argsort(dim=1, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return among & (rank < count[:, None])
