"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, let the later columns make up for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Pruner
from llmprune.numerics.gram import inverse_factor, sweep


class SparseGPT(Pruner):
    """One pass over the columns in blocks, with the upper Cholesky factor U of the inverse damped Gram matrix.

    Unstructured masks share a block's budget over all rows of the block together (scope `matrix`, as published).
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
            return job.pattern.select(
                columns.square() / scale[start : start + columns.shape[1]], job.sparsity, start
            )

        step = max(width, self.config.block // width * width)  # a group of m columns is never cut
        weight, keep = sweep(job, factor, step, width if width > 1 else step, choose)
        return Pruned(weight, keep, job.weight.square() / scale, {"damp": damp})
