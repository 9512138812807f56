"""Rounding that is made up for (GPTQ, arXiv 2210.17323, and QuantEase, arXiv 2309.01885, on a mask): kept
weights become codes of a few bits with a scale for every 128 columns of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Step
from llmprune.numerics import grids
from llmprune.numerics.gram import damped, descend, inverse_factor, round_columns


class Rounding(Step):
    """Rounds column by column, and lets later columns make up for each; then passes of coordinate descent.

    Of several scales that one is taken whose squared error, weighted by the inputs' mean squares, is least.
    Where no token has reached the matrix nothing is made up for.
    """

    needs = Need.GRAM
    changes = "weights"
    visits, solves = 300, 1

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of rounding.

        Attributes:
            bits: of a code: 8, 4, 3 or 2.
            damp: added to the Gram diagonal, relative to its mean.
            passes: of coordinate descent.
        """

        bits: int = 4
        damp: float = 0.01
        passes: int = 2

        def __post_init__(self) -> None:
            if self.bits not in grids.BITS:
                raise ValueError(f"bits must be one of {', '.join(map(str, grids.BITS))}, got {self.bits}")
            if not self.damp > 0:
                raise ValueError(f"damp must be above 0, got {self.damp}")
            if self.passes < 0:
                raise ValueError(f"passes must be at least 0, got {self.passes}")

    @property
    def products(self) -> float:  # type: ignore[override]
        return self.config.passes + 2  # type: ignore[no-any-return]

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        bits, keep, reached = self.config.bits, pruned.keep, job.stats.count > 0
        scales = grids.scales_of(
            pruned.weight, bits, grids.GROUP, job.stats.gram.diagonal() if reached else None
        )
        steps = scales.float().T.contiguous()

        def snap(column: Tensor, j: int) -> Tensor:
            return grids.rounded(column, steps[j // grids.GROUP], bits)

        if not reached:
            weight = grids.rounded(pruned.weight, grids.spread(scales, pruned.weight.shape), bits)
            return replace(pruned, weight=torch.where(keep, weight, 0.0), scales=scales)
        factor, damp = inverse_factor(job, self.config.damp)
        weight = round_columns(pruned.weight, keep, factor, snap)
        if self.config.passes:
            matrix = damped(job.stats.gram, damp)
            weight = descend(pruned.weight, weight, keep, matrix, snap, self.config.passes)
        return replace(pruned, weight=weight, scales=scales, notes={**pruned.notes, "damp": damp})
