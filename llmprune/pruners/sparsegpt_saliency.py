"""SparseGPT's saliency as a score alone (Frantar and Alistarh,
arXiv 2301.00774): the mask without the weight update.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.contracts import Job, Need, Pruned, Pruner
from llmprune.numerics.gram import inverse_factor


class SparseGPTSaliency(Pruner):
    """Score `W_ij^2 / U_jj^2`, where U is the upper Cholesky factor of the inverse damped Gram matrix.

    It is compared over all columns at once.
    """

    needs = Need.GRAM
    solves = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`damp`: added to the Gram diagonal, relative to its mean."""

        damp: float = 0.01

        def __post_init__(self) -> None:
            if not self.damp > 0:
                raise ValueError(f"damp must be above 0, got {self.damp}")

    def prune(self, job: Job) -> Pruned:
        factor, damp = inverse_factor(job, self.config.damp)
        alive = job.stats.gram.diagonal() != 0
        score = job.weight.square() * (alive / factor.diagonal().square())
        keep = job.pattern.select(score, job.sparsity)
        return Pruned(job.weight * keep, keep, score, {"damp": damp})
