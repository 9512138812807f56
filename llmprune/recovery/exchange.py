"""Exchange of weights at a fixed sparsity: some of the kept ones are dropped, and as many others grow."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.patterns import NM, Unstructured, keep_highest
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

        Dropped are `floor(share * kept)` of each row, of the whole matrix where its counts are of the whole.
        """
        assert view.aim is not None
        pattern, keep, weight = view.aim[0], view.keep, view.weight
        whole = isinstance(pattern, Unstructured) and pattern.scope == "matrix"
        rows = keep.reshape(1, -1) if whole else keep
        weight = weight.reshape(1, -1) if whole else weight
        kept = rows.sum(dim=1)
        dropped = (kept.double() * view.phase.share).floor().long()
        if isinstance(pattern, NM) or bool((kept == kept[0]).all()):
            return self._dropped(rows, weight, int(kept[0]), int(dropped[0])).view_as(keep)
        parts = [
            self._dropped(rows[i : i + 1], weight[i : i + 1], int(kept[i]), int(dropped[i]))
            for i in range(len(rows))
        ]
        return torch.cat(parts).view_as(keep)

    def _dropped(self, keep: Tensor, weight: Tensor, kept: int, count: int) -> Tensor:
        """The mask without `count` of each row, of which it keeps `kept`."""
        pruned = keep.shape[1] - kept
        if self.config.drop == "magnitude":
            return keep_highest(torch.where(keep, weight.abs(), -1.0), pruned + count)
        # Of the positive ones the smallest half, of the negative ones the other, as far as there are so many.
        positive, negative = keep & (weight > 0), keep & ~(weight > 0)
        gone = torch.zeros_like(keep)
        for row in range(len(keep)):
            up, down = int(positive[row].sum()), int(negative[row].sum())
            first = min(up, count - min(down, count // 2), count - count // 2)
            first = max(first, count - down)
            for side, many in ((positive, first), (negative, count - first)):
                if many:
                    size = torch.where(side[row], weight[row].abs(), torch.inf)
                    gone[row, size.argsort(stable=True)[:many]] = True
        return keep & ~gone
