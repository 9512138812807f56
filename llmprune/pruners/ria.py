"""RIA (Zhang et al., ICLR 2024): a weight's share of its
row and of its column, times the input's norm to a power.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Need, ScorePruner


class RIA(ScorePruner):
    """Score `(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * sqrt(m2_j)^power`, compared per row.

    m2_j is the mean square of input feature j.
    """

    needs = Need.SECOND_MOMENT

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`power`: exponent of the input norm."""

        power: float = 0.5

        def __post_init__(self) -> None:
            if self.power < 0:
                raise ValueError(f"power must not be negative, got {self.power}")

    def score(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor:
        size = weight.abs()
        # The sum of a row or column of zeros is 0; the floor avoids 0 / 0, and its scores are 0.
        tiny = torch.finfo(size.dtype).tiny
        of_row = size.sum(dim=1, keepdim=True).clamp_min(tiny).reciprocal()
        of_column = size.sum(dim=0).clamp_min(tiny).reciprocal()
        return size * (of_row + of_column) * stats.second_moment.pow(self.config.power / 2)
