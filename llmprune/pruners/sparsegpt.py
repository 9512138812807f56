"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune
column by column, let the later columns make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Pruner
from llmprune.numerics.gram import inverse_factor, sweep


class SparseGPT(Pruner):
    """One pass over blocks of columns, with the upper Cholesky factor U of the inverse damped Gram matrix.

    The score is `W_ij^2 / U_jj^2`, with W as the pass has updated it so far. For unstructured masks it is
    compared over all rows of a block of columns (scope `matrix`, as published).
    """

    needs = Need.GRAM
    scope = "matrix"
    visits, products, solves = 150, 1, 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`damp`: added to the Gram diagonal, relative to its mean. `block`: columns per block."""

        damp: float = 0.01
        block: int = 128

        def __post_init__(self) -> None:
            if not self.damp > 0:
                raise ValueError(f"damp must be above 0, got {self.damp}")
            if self.block < 1:
                raise ValueError(f"block must be at least 1, got {self.block}")

    def prune(self, job: Job) -> Pruned:
        factor, damp = inverse_factor(job, self.config.damp)
        scale = factor.diagonal().square()
        width = job.pattern.width

        def choose(columns: Tensor, start: int) -> Tensor:
            score = columns.square() / scale[start : start + columns.shape[1]]
            return job.pattern.select(score, job.sparsity, start)

        step = max(width, self.config.block // width * width)  # a multiple of m: no N:M group is split
        weight, keep = sweep(job, factor, step, width if width > 1 else step, choose)
        return Pruned(weight, keep, job.weight.square() / scale, {"damp": damp})
