"""OBS sweep (the update of SparseGPT, arXiv 2301.00774, for a
mask already chosen): later columns make up for pruned ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Step
from llmprune.numerics.gram import inverse_factor, sweep


class OBS(Step):
    """One pass over the columns of the dense weights, as in SparseGPT, but with a given mask.

    It uses the upper Cholesky factor of the inverse damped Gram matrix.
    """

    needs = Need.GRAM
    changes = "weights"
    visits, products, solves = 100, 1, 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`damp`: added to the Gram diagonal, relative to its mean.

        `block`: columns per block (affects only speed).
        """

        damp: float = 0.01
        block: int = 128

        def __post_init__(self) -> None:
            if not self.damp > 0:
                raise ValueError(f"damp must be above 0, got {self.damp}")
            if self.block < 1:
                raise ValueError(f"block must be at least 1, got {self.block}")

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        factor, damp = inverse_factor(job, self.config.damp)

        def given_mask(columns: Tensor, start: int) -> Tensor:
            return pruned.keep[:, start : start + columns.shape[1]]

        weight, keep = sweep(job, factor, self.config.block, self.config.block, given_mask)
        return Pruned(weight, keep, pruned.score, {**pruned.notes, "damp": damp})
